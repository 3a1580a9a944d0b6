"""Deterministic projection of any level vector onto the budget.

Foreign optimizers propose vectors that ignore the budget. Repair rounds to the nearest allowed levels, then takes the
single steps that move least away from the proposal for the cost they free (or add) until every resource is within its
floor and budget. Ties go to the later unit, or at random where a generator is given: breaking them by position biases
an optimizer's whole search.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from evo_hpo.errors import InfeasibleError, InvalidSpaceError

if TYPE_CHECKING:
    from numpy.random import Generator

    from evo_hpo.space.compression_space import Assignment, CompressionSpace

__all__ = ["repair"]

SMALL = 200_000
"""Cells of the table of costs up to which several resources are projected exactly, within milliseconds."""


def repair(
    space: CompressionSpace, levels: Sequence[float], rng: Generator | None = None, *, fill: bool = False
) -> Assignment:
    """The feasible assignment reached from ``levels`` (real-valued level indices, one a unit) by least-distance steps.

    Args:
        space: where the result is feasible.
        levels: proposal, may be fractional, out of range or over the budget.
        rng: breaks ties at random; without it, the same proposal always gives the same result.
        fill: spend what is left of the budget too, by raising the units whose proposal is furthest above.

    Raises:
        InvalidSpaceError: wrong length, or entries that are not finite.
        InfeasibleError: the space has no feasible assignment.
    """
    wish = [float(x) for x in levels]
    if len(wish) != len(space.units) or not all(map(math.isfinite, wish)):
        raise InvalidSpaceError(f"repair needs {len(space.units)} finite levels, got {len(wish)}: {wish[:5]} ...")
    ties: Sequence[float] = rng.random(len(wish)).tolist() if rng is not None else range(len(wish), 0, -1)
    current = [min(max(round(w), low), high) for w, low, high in zip(wish, space.lowest, space.highest, strict=True)]
    if space.dimensions == 1:
        _walk(space, current, wish, ties, fill)
    elif space._counter.cells > SMALL:
        _walk_several(space, current, wish, ties)
    if not space.feasible(current):
        current = _nearest(space, wish, ties)
    if fill and space.dimensions > 1:
        _fill(space, current, wish, ties)
    return tuple(current)


def _walk(space: CompressionSpace, current: list[int], wish: list[float], ties: Sequence[float], fill: bool) -> None:
    """One resource: cheapest steps down to the budget, then up to the floor (or as far as the budget allows)."""
    costs = [[level[0] for level in unit] for unit in space.vectors]
    spent = sum(c[k] for c, k in zip(costs, current, strict=True))

    def step(i: int, sign: int) -> tuple[float, float, int]:
        """Added distance from the proposal for each unit of cost moved; lower is better."""
        after = current[i] + sign
        moved = abs(costs[i][after] - costs[i][current[i]]) or 1
        return (abs(after - wish[i]) - abs(current[i] - wish[i])) / moved, ties[i], i

    def allowed(i: int, sign: int) -> bool:
        return current[i] > space.lowest[i] if sign < 0 else current[i] < space.highest[i]

    if spent > space.budget:
        heap = [step(i, -1) for i in range(len(current)) if allowed(i, -1)]
        heapq.heapify(heap)
        while spent > space.budget and heap:
            i = heapq.heappop(heap)[2]
            spent -= costs[i][current[i]] - costs[i][current[i] - 1]
            current[i] -= 1
            if allowed(i, -1):
                heapq.heappush(heap, step(i, -1))
    if fill or spent < space.floor:
        target = space.budget if fill else space.floor
        heap = [step(i, +1) for i in range(len(current)) if allowed(i, +1)]
        heapq.heapify(heap)
        while spent < target and heap:
            i = heapq.heappop(heap)[2]
            added = costs[i][current[i] + 1] - costs[i][current[i]]
            if spent + added > space.budget:
                continue
            spent += added
            current[i] += 1
            if allowed(i, +1):
                heapq.heappush(heap, step(i, +1))


def _walk_several(space: CompressionSpace, current: list[int], wish: list[float], ties: Sequence[float]) -> None:
    """Several resources: steps that bring those out of their limits nearer to them, without putting others out.

    Steps are taken in order of added distance for what they bring, in shares of each resource's limit. It may end
    short of the limits where costs of two resources run against each other.
    """
    spent = space.costs(current)
    limits = [max(b, 1) for b in space.budgets]

    def outside(costs: Sequence[int]) -> list[float]:
        """How far each resource is out of its limits."""
        return [
            max(c - b, f - c, 0) / limit
            for c, f, b, limit in zip(costs, space.floors, space.budgets, limits, strict=True)
        ]

    def step(i: int, sign: int) -> tuple[float, float, int, int] | None:
        after = current[i] + sign
        if not space.lowest[i] <= after <= space.highest[i]:
            return None
        before, then = space.vectors[i][current[i]], space.vectors[i][after]
        new = outside([s + b - a for s, a, b in zip(spent, before, then, strict=True)])
        if any(n > o for n, o in zip(new, out, strict=True)) or sum(new) >= sum(out):
            return None
        distance = abs(after - wish[i]) - abs(current[i] - wish[i])
        return distance / (sum(out) - sum(new)), ties[i], i, sign

    out = outside(spent)
    while any(out):
        heap = [s for i in range(len(current)) for sign in (-1, +1) if (s := step(i, sign)) is not None]
        if not heap:
            return
        heapq.heapify(heap)
        short = [o > 0 for o in out]
        while heap and [o > 0 for o in out] == short:  # which steps help changes with what is out of its limits
            _, _, i, sign = heapq.heappop(heap)
            if step(i, sign) is None:
                continue
            before, then = space.vectors[i][current[i]], space.vectors[i][current[i] + sign]
            spent = tuple(s + b - a for s, a, b in zip(spent, before, then, strict=True))
            current[i] += sign
            out = outside(spent)
            if (again := step(i, sign)) is not None:
                heapq.heappush(heap, again)


def _fill(space: CompressionSpace, current: list[int], wish: list[float], ties: Sequence[float]) -> None:
    """Several resources: steps up while all of them stay within their limits, those nearest to the proposal first."""
    spent = space.costs(current)

    def step(i: int) -> tuple[float, float, int]:
        moved = space.vectors[i][current[i] + 1][0] - space.vectors[i][current[i]][0] or 1
        return (abs(current[i] + 1 - wish[i]) - abs(current[i] - wish[i])) / moved, ties[i], i

    heap = [step(i) for i in range(len(current)) if current[i] < space.highest[i]]
    heapq.heapify(heap)
    while heap:
        i = heapq.heappop(heap)[2]
        levels = space.vectors[i]
        after = tuple(s + b - a for s, a, b in zip(spent, levels[current[i]], levels[current[i] + 1], strict=True))
        if all(f <= a <= b for f, a, b in zip(space.floors, after, space.budgets, strict=True)):
            spent = after
            current[i] += 1
            if current[i] < space.highest[i]:
                heapq.heappush(heap, step(i))


def _nearest(space: CompressionSpace, wish: list[float], ties: Sequence[float]) -> list[int]:
    """The feasible assignment of least total distance, by dynamic programming over the costs of all resources."""
    options, tables, exact = space._counter._table
    shape = tables[0].shape
    best = np.full(shape, np.inf)
    best[tables[-1] > 0] = 0.0
    choices = []
    scale = 1e-9 / (max(ties) or 1)
    for i in range(len(options) - 1, -1, -1):
        following, choice = np.full(shape, np.inf), np.zeros(shape, dtype=np.int16)
        for pick, level in enumerate(options[i]):
            if any(c >= s for c, s in zip(level, shape, strict=True)):
                continue
            distance = abs(pick + space.lowest[i] - wish[i]) * (1 + scale * ties[i])
            source = tuple(slice(c, None) for c in level)
            target = tuple(slice(None, s - c) for c, s in zip(level, shape, strict=True))
            better = best[source] + distance < following[target]
            following[target] = np.where(better, best[source] + distance, following[target])
            choice[target] = np.where(better, pick, choice[target])
        best = following
        choices.append(choice)
    spent, result = (0,) * len(shape), []
    if not np.isfinite(best[spent]):
        raise InfeasibleError("no assignment is within floor and budget: widen them")
    for i, choice in enumerate(reversed(choices)):
        pick = int(choice[spent])
        result.append(pick + space.lowest[i])
        spent = tuple(a + b for a, b in zip(spent, options[i][pick], strict=True))
    if not exact and not space.feasible(result):
        raise InfeasibleError("floor and budget are closer than the grid of costs resolves: widen them")
    return result
