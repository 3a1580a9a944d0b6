"""Minimisation of an additive loss under the budget, and within a number of changed units of a start.

``minimise sum_u effects[u][level_u]`` over feasible assignments is a multiple-choice knapsack problem. Dynamic
programming over cost (and number of changes) solves one resource on a coarse grid of costs, labels at the prices of a
linear programme solve finer grids and several resources (nearly, where the floor is close to the budget); HiGHS, a
mixed-integer solver, solves any, in seconds where several are tight, in hours where costs are fine and the floor is
close to the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.several import allowed, held, solve_with_prices

Effects = Sequence[Sequence[float]]
"""Loss of each unit's levels; ``inf`` forbids a level."""

NODES = 100_000  # of the branch and bound tree: a limit in seconds would give other trials on another machine
MOST_CELLS = 40_000_000  # of the table of choices, a byte each (two above 256 levels)


def solve(
    space: CompressionSpace,
    effects: Effects,
    *,
    start: Assignment | None = None,
    changes: int | None = None,
    exact: bool = True,
) -> Assignment | None:
    """By dynamic programming where costs are one resource's and on a coarse enough grid.

    Else from prices, see :mod:`searchers.additive.several`; without ``exact``, the first that is found.
    """
    return solve_many(space, [effects], start=start, changes=changes, exact=exact)[0]


def solve_many(
    space: CompressionSpace,
    batch: Sequence[Effects],
    *,
    start: Assignment | None = None,
    changes: int | None = None,
    exact: bool = True,
) -> list[Assignment | None]:
    """:func:`solve` for several effects at once, which shares the work of the table."""
    start = space.lowest if start is None else start
    changes = changes if changes is None else min(changes, len(space))
    if not space.knapsack.several:
        low, high = _range(space, batch, start, changes)
        if (high - low + 1) * (1 if changes is None else changes + 1) * len(space) * len(batch) <= MOST_CELLS:
            return _tabulate(space, batch, start, changes)
    return [solve_with_prices(space, e, start=start, changes=changes, exact=exact) for e in batch]


def solve_by_dynamic_programming(
    space: CompressionSpace, effects: Effects, *, start: Assignment | None = None, changes: int | None = None
) -> Assignment | None:
    """The best feasible assignment with at most ``changes`` units other than in ``start``; None: there is none.

    One resource only; time and memory grow with units x distinct costs x changes.
    """
    return _tabulate(space, [effects], space.lowest if start is None else start, changes)[0]


def _steps(space: CompressionSpace, start: Assignment) -> list[list[int]]:
    """Cost of each allowed level above the start's level, in units of the greatest common divisor."""
    options = space.knapsack.counter.options
    return [
        [unit[k][0] - unit[s - low][0] for k in range(len(unit))]
        for unit, s, low in zip(options, start, space.lowest, strict=True)
    ]


def _range(
    space: CompressionSpace, batch: Sequence[Effects], start: Assignment, changes: int | None
) -> tuple[int, int]:
    """Least and most that any partial sum of at most ``changes`` changes to allowed levels can cost above the start."""
    steps = [
        [0] + [s for k, s in enumerate(unit, low) if any(effects[u][k] < np.inf for effects in batch)]
        for u, (unit, low) in enumerate(zip(_steps(space, start), space.lowest, strict=True))
    ]
    most = len(steps) if changes is None else changes
    ups = sum(sorted((max(s) for s in steps), reverse=True)[:most])
    downs = -sum(sorted(min(s) for s in steps)[:most])
    slack = space.slack(start) // space.knapsack.counter.steps[0]
    return -downs, max(0, min(ups, slack + downs))


def _tabulate(
    space: CompressionSpace, batch: Sequence[Effects], start: Assignment, changes: int | None
) -> list[Assignment | None]:
    """Dynamic programming from the last unit to the first: best loss to go, by cost and changes left."""
    if changes is not None:
        changes = min(changes, len(space))
    low, high = _range(space, batch, start, changes)
    steps, divisor = _steps(space, start), space.knapsack.counter.steps[0]
    spent, width = space.cost(start), high - low + 1
    layers = 1 if changes is None else changes + 1
    above = np.arange(low, high + 1)  # in units of the divisor: costs themselves may exceed 64 bits
    affordable = (above <= (space.budget - spent) // divisor) & (above >= -((spent - space.floor) // divisor))
    best = np.full((len(batch), layers, width), np.inf)
    best[:, :, affordable] = 0.0
    kind = np.min_scalar_type(max(map(len, steps)) - 1)
    choices = np.zeros((len(space), len(batch), layers, width), dtype=kind)
    losses = [
        np.array([[effects[u][space.lowest[u] + k] for k in range(len(steps[u]))] for effects in batch])
        for u in range(len(space))
    ]
    for u in range(len(space) - 1, -1, -1):
        following = np.full_like(best, np.inf)
        for k, step in enumerate(steps[u]):
            changed = changes is not None and space.lowest[u] + k != start[u]
            # best[left, spent] is the loss to go with `left` changes left and `spent` above the start so far.
            source = best[:, : layers - 1] if changed else best
            if abs(step) >= width or not np.isfinite(losses[u][:, k]).any():
                continue
            here = slice(max(0, -step), width - max(0, step))
            there = slice(max(0, step), width + min(0, step))
            candidate = source[:, :, there] + losses[u][:, k, None, None]
            target = (following[:, 1:] if changed else following)[:, :, here]
            chosen = (choices[u][:, 1:] if changed else choices[u])[:, :, here]
            better = candidate < target
            np.copyto(target, candidate, where=better)
            np.copyto(chosen, kind.type(k), where=better)
        best = following
    return [_trace(space, choices[:, b], steps, best[b], start, changes, low) for b in range(len(batch))]


def _trace(
    space: CompressionSpace,
    choices: np.ndarray[Any, Any],
    steps: list[list[int]],
    best: np.ndarray[Any, Any],
    start: Assignment,
    changes: int | None,
    low: int,
) -> Assignment | None:
    left, at = best.shape[0] - 1, -low
    if not np.isfinite(best[left, at]):
        return None
    levels = []
    for u, table in enumerate(choices):
        k = int(table[left, at])
        levels.append(space.lowest[u] + k)
        at += steps[u][k]
        left -= int(changes is not None and levels[-1] != start[u])
    return tuple(levels)


def solve_by_integer_programming(
    space: CompressionSpace, effects: Effects, *, start: Assignment | None = None, changes: int | None = None
) -> Assignment | None:
    """The same by HiGHS: one binary a unit and level, one row a unit and a resource, and one for the changes."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import, and most processes never come here
    from scipy.sparse import coo_array

    pairs = allowed(space, effects)
    if len({u for u, _ in pairs}) < len(space):
        return None
    units = np.array([u for u, _ in pairs])
    counter = space.knapsack.counter
    options = zip(*(counter.options[u][k - space.lowest[u]] for u, k in pairs), strict=True)
    rows_of_costs = zip(map(held, options, counter.budgets), counter.floors, counter.budgets, strict=True)
    columns = np.arange(len(pairs))
    one_level = coo_array((np.ones(len(pairs)), (units, columns)), shape=(len(space), len(pairs)))
    rows = [LinearConstraint(one_level, 1, 1)]
    rows += [
        LinearConstraint(np.array(costs, dtype=float)[None, :], floor, budget) for costs, floor, budget in rows_of_costs
    ]
    if changes is not None and start is not None:
        changed = np.array([float(start[u] != k) for u, k in pairs])
        rows.append(LinearConstraint(changed[None, :], 0, changes))
    weights = np.array([effects[u][k] for u, k in pairs])
    scale = float(np.abs(weights).max()) or 1.0
    found = milp(
        weights / scale,
        integrality=np.ones(len(pairs), dtype=int),
        bounds=Bounds(0, 1),
        constraints=rows,
        options={"mip_rel_gap": 1e-9, "node_limit": NODES},
    )
    if found.x is None:
        return None
    levels = [0] * len(space)
    for (u, k), taken in zip(pairs, found.x, strict=True):
        if taken > 0.5:
            levels[u] = k
    return tuple(levels) if space.feasible(levels) else None
