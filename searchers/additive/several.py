"""Minimisation of an additive loss under any number of budgets: prices from a linear programme, then labels.

The dual of the linear relaxation gives a bound and a price a resource. At these prices every level of a unit costs so
much more than the unit's best one (its reduced cost), and the reduced costs of an assignment add up to at most what it
loses above the bound. So all assignments within a distance of the bound are made of the few levels whose reduced costs
add up to no more: they are enumerated, unit by unit, as far as they can still meet the budgets. Where the best of them
is itself within the distance, no other assignment is better (reduced-cost fixing, as in Pisinger, EJOR 83, 1995).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evo_hpo.errors import InvalidSpaceError
from evo_hpo.space.compression_space import Assignment, CompressionSpace

Array = np.ndarray[Any, Any]

FIRST = 32
"""Levels beside the best ones that are looked at first."""

MANY = 2000
"""Partial assignments above which those that cost the same are compared."""

MOST_LABELS = 5_000
"""Partial assignments that are kept; where there are more, those of least reduced cost."""


SMALL = 1e-3
"""Losses below it are scaled for the relaxation, whose tolerance is absolute (1e-7)."""

LARGEST_EXACT = 2**50
"""Of doubles, with room for sums."""


def held(costs: Sequence[int], budget: int) -> Sequence[int]:
    """A row of costs that doubles hold.

    Raises:
        InvalidSpaceError: they do not.
    """
    if (largest := max(*costs, budget)) > LARGEST_EXACT:
        raise InvalidSpaceError(
            f"costs of up to {largest} after division by what they have in common are beyond what the solver holds "
            f"exactly, {LARGEST_EXACT}: count in larger units"
        )
    return costs


@dataclass(frozen=True)
class _Relaxed:
    """The linear relaxation.

    Attributes:
        units, losses, costs: of each allowed level of each unit; costs: levels x rows.
        low, high: limits of the rows.
        bound: least loss of the relaxation.
        reduced: reduced cost of each level, 0 for the best of its unit.
    """

    units: Array
    losses: Array
    costs: Array
    low: Array
    high: Array
    bound: float
    reduced: Array


def allowed(space: CompressionSpace, effects: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Each unit with each of its levels, but those of infinite effect."""
    return [
        (u, k)
        for u in range(len(space))
        for k in range(space.lowest[u], space.highest[u] + 1)
        if np.isfinite(effects[u][k])
    ]


def solve_with_prices(
    space: CompressionSpace,
    effects: Sequence[Sequence[float]],
    *,
    start: Assignment | None = None,
    changes: int | None = None,
    exact: bool = True,
) -> Assignment | None:
    """The best feasible assignment with at most ``changes`` units other than in ``start``, or nearly.

    With ``exact`` it is the best unless more than :data:`MOST_LABELS` partial assignments are close to the bound,
    else the first that is found; the start where that is feasible and no better one was found; None: none was.
    """
    pairs = allowed(space, effects)
    relaxed = _relaxed(space, effects, pairs, start, changes)
    if relaxed is None:
        return None
    ordered = np.sort(relaxed.reduced)
    dearest = np.zeros(len(space))
    np.maximum.at(dearest, relaxed.units, relaxed.reduced)
    most = float(dearest.sum())  # that the reduced costs of an assignment add up to
    least = float(ordered[ordered > 1e-12].min(initial=np.inf))  # below it there is nothing but ties
    within, best = float(ordered[min(len(space) + FIRST, len(ordered)) - 1]), _started(space, effects, pairs, start)
    while True:
        found = _labelled(relaxed, within)
        best = min(best, found, key=lambda one: one.loss)
        if (
            not found.whole
            or (found.taken is not None and not exact)
            or best.loss - relaxed.bound <= within
            or within >= most
        ):
            break
        within = min(most, max(1.5 * within + 1e-12, least), best.loss - relaxed.bound)
    if best.taken is None:
        return None
    levels = [0] * len(space)
    for pair in best.taken.tolist():
        u, k = pairs[pair]
        levels[u] = k
    return tuple(levels)


def _started(
    space: CompressionSpace,
    effects: Sequence[Sequence[float]],
    pairs: Sequence[tuple[int, int]],
    start: Assignment | None,
) -> _Found:
    """The start, or nothing where it may not be taken."""
    if start is None or not space.feasible(start) or not all(np.isfinite(effects[u][k]) for u, k in enumerate(start)):
        return _Found(None, np.inf, True)
    at = {pair: number for number, pair in enumerate(pairs)}
    taken = np.array([at[pair] for pair in enumerate(start)])
    return _Found(taken, float(sum(effects[u][k] for u, k in enumerate(start))), True)


def _relaxed(
    space: CompressionSpace,
    effects: Sequence[Sequence[float]],
    pairs: Sequence[tuple[int, int]],
    start: Assignment | None,
    changes: int | None,
) -> _Relaxed | None:
    """None: even the relaxation has no solution."""
    if len({u for u, _ in pairs}) < len(space):
        return None
    from scipy.optimize import linprog  # slow to import, and most processes never come here
    from scipy.sparse import coo_array

    counter = space.knapsack.counter
    units = np.array([u for u, _ in pairs])
    losses = np.array([effects[u][k] for u, k in pairs])
    options = [counter.options[u][k - space.lowest[u]] for u, k in pairs]
    costs = np.array([*map(held, zip(*options, strict=True), counter.budgets)], dtype=float).T
    low, high = np.array(counter.floors, dtype=float), np.array(counter.budgets, dtype=float)
    if changes is not None and start is not None:
        costs = np.column_stack([costs, [float(start[u] != k) for u, k in pairs]])
        low, high = np.append(low, 0.0), np.append(high, changes)
    scale = np.maximum(np.abs(costs).max(0), 1.0)
    unit = largest if 0 < (largest := float(np.abs(losses).max())) < SMALL else 1.0
    rows, floored = costs.T / scale[:, None], low > 0
    one_level = coo_array((np.ones(len(pairs)), (units, np.arange(len(pairs)))), shape=(len(space), len(pairs)))
    found: Any = linprog(  # type: ignore[call-overload]
        losses / unit,
        A_ub=np.vstack([rows, -rows[floored]]),
        b_ub=np.append(high / scale, -(low / scale)[floored]),
        A_eq=one_level.tocsr(),
        b_eq=np.ones(len(space)),
        method="highs",
    )
    if found.x is None:
        return None
    marginals = unit * found.ineqlin.marginals
    prices = -marginals[: len(rows)]
    prices[floored] += marginals[len(rows) :]
    reduced = losses + prices @ rows
    best = np.full(len(space), np.inf)
    np.minimum.at(best, units, reduced)
    return _Relaxed(units, losses, costs, low, high, float(found.fun), reduced - best[units])


@dataclass(frozen=True)
class _Found:
    """Indices of the levels of an assignment, or None; its loss; whether all that could be better was looked at."""

    taken: Array | None
    loss: float
    whole: bool


def _labelled(relaxed: _Relaxed, within: float) -> _Found:
    """The best feasible assignment whose reduced costs add up to at most ``within``."""
    near = np.flatnonzero(relaxed.reduced <= within + 1e-12)
    ends = np.flatnonzero(np.diff(relaxed.units[near], append=-1)) + 1
    every = np.split(near, ends[:-1])
    options, settled = [own for own in every if len(own) > 1], np.array([own[0] for own in every if len(own) == 1], int)
    none = np.zeros((1, len(relaxed.low)))
    least = np.concatenate([none, np.cumsum([relaxed.costs[own].min(0) for own in reversed(options)] or none, 0)])[::-1]
    most = np.concatenate([none, np.cumsum([relaxed.costs[own].max(0) for own in reversed(options)] or none, 0)])[::-1]
    spent, loss = relaxed.costs[settled].sum(0)[None], relaxed.losses[settled].sum()[None]
    reduced, whole = np.zeros(1), True
    steps: list[tuple[Array, Array]] = []
    for n, own in enumerate(options):
        reduced_next = (reduced[:, None] + relaxed.reduced[own]).ravel()
        spent_next = (spent[:, None] + relaxed.costs[own]).reshape(-1, spent.shape[1])
        kept = np.flatnonzero(
            (reduced_next <= within + 1e-12)
            & (spent_next + least[n + 1] <= relaxed.high).all(1)
            & (spent_next + most[n + 1] >= relaxed.low).all(1)
        )
        losses = (loss[:, None] + relaxed.losses[own]).ravel()
        if len(kept) > MANY:
            kept = kept[_cheapest(spent_next[kept], losses[kept])]
        if len(kept) > MOST_LABELS:
            kept, whole = kept[np.argpartition(reduced_next[kept], MOST_LABELS)[:MOST_LABELS]], False
        if not len(kept):
            return _Found(None, np.inf, whole)
        loss = losses[kept]
        spent, reduced = spent_next[kept], reduced_next[kept]
        steps.append((kept // len(own), own[kept % len(own)]))
    at, taken = int(np.argmin(loss)), settled.tolist()
    found = float(loss[at])
    if not options and not ((spent <= relaxed.high) & (spent >= relaxed.low)).all():
        return _Found(None, np.inf, whole)
    for parents, chosen in reversed(steps):
        taken.append(chosen[at])
        at = parents[at]
    return _Found(np.array(taken), found, whole)


def _cheapest(spent: Array, losses: Array) -> Array:
    """Of partial assignments that cost the same of everything, the one that loses least."""
    order = np.lexsort((losses, *spent.T))
    ordered = spent[order]
    found: Array = order[np.append(True, (ordered[1:] != ordered[:-1]).any(1))]
    return found
