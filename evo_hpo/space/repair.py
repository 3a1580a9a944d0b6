"""Deterministic projection of any level vector onto the budget.

Foreign optimizers propose vectors that ignore the budget. Repair rounds to the nearest allowed levels, then takes the
single steps that move least away from the proposal for the cost they free (or add) until every resource is within its
floor and budget. Ties go to the later unit, or at random where a generator is given: breaking them by position biases
an optimizer's whole search.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from evo_hpo.errors import InfeasibleError, InvalidSpaceError
from evo_hpo.space.knapsack import Assignment, Cursor, Knapsack

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["repair"]

SMALL = 200_000
"""Cells of the table of costs up to which several resources are projected exactly, within milliseconds."""


def repair(
    knapsack: Knapsack, levels: Sequence[float], rng: Generator | None = None, *, fill: bool = False
) -> Assignment:
    """The feasible assignment reached from ``levels`` (real-valued level indices, one a unit) by least-distance steps.

    Args:
        knapsack: where the result is feasible.
        levels: proposal, may be fractional, out of range or over the budget.
        rng: breaks ties at random; without it, the same proposal always gives the same result.
        fill: spend what is left of the budget too, by raising the units whose proposal is furthest above.

    Raises:
        InvalidSpaceError: wrong length, or entries that are not finite.
        InfeasibleError: the knapsack has no feasible assignment.
    """
    wish = [float(x) for x in levels]
    if len(wish) != len(knapsack.costs) or not all(map(math.isfinite, wish)):
        raise InvalidSpaceError(f"repair needs {len(knapsack.costs)} finite levels, got {len(wish)}: {wish[:5]} ...")
    ties: Sequence[float] = rng.random(len(wish)).tolist() if rng is not None else range(len(wish), 0, -1)
    limits = zip(wish, knapsack.lowest, knapsack.highest, strict=True)
    cursor = knapsack.cursor([min(max(round(w), low), high) for w, low, high in limits])

    def farther(unit: int, by: int) -> float:
        """Distance from the proposal that a step adds."""
        return abs(cursor.levels[unit] + by - wish[unit]) - abs(cursor.levels[unit] - wish[unit])

    if not knapsack.several:
        cursor.follow(-1, farther, ties, 0)
        cursor.follow(+1, farther, ties, 0 if fill else knapsack.room[0])
    elif knapsack.counter.cells > SMALL:
        _walk_several(cursor, farther, ties)
    if not cursor.feasible:
        cursor = knapsack.cursor(_nearest(knapsack, wish, ties))
    if fill and knapsack.several:
        cursor.follow(+1, farther, ties, -1)
    return tuple(cursor.levels)


def _walk_several(cursor: Cursor, farther: Callable[[int, int], float], ties: Sequence[float]) -> None:
    """Several resources: steps that bring those out of their limits nearer to them, without putting others out.

    Steps are taken in order of added distance for what they bring, in shares of each resource's limit. It may end
    short of the limits where costs of two resources run against each other.
    """
    knapsack = cursor.knapsack
    limits = [max(b, 1) for b in knapsack.budgets]

    def outside(left: Sequence[int]) -> list[float]:
        """How far each resource is out of its limits."""
        return [max(-u, u - most, 0) / limit for u, most, limit in zip(left, knapsack.room, limits, strict=True)]

    def step(i: int, by: int) -> tuple[float, float, int, int] | None:
        if not cursor.can(i, by):
            return None
        new = outside(cursor.after(i, by))
        if any(n > o for n, o in zip(new, out, strict=True)) or sum(new) >= sum(out):
            return None
        return farther(i, by) / (sum(out) - sum(new)), ties[i], i, by

    out = outside(cursor.left)
    while any(out):
        heap = [s for i in knapsack.free for by in (-1, +1) if (s := step(i, by)) is not None]
        if not heap:
            return
        heapq.heapify(heap)
        short = [o > 0 for o in out]
        while heap and [o > 0 for o in out] == short:  # which steps help changes with what is out of its limits
            _, _, i, by = heapq.heappop(heap)
            if step(i, by) is None:
                continue
            cursor.step(i, by)
            out = outside(cursor.left)
            if (again := step(i, by)) is not None:
                heapq.heappush(heap, again)


def _nearest(knapsack: Knapsack, wish: list[float], ties: Sequence[float]) -> list[int]:
    """The feasible assignment of least total distance, by dynamic programming over the costs of all resources."""
    options, tables, exact = knapsack.counter.table
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
            distance = abs(pick + knapsack.lowest[i] - wish[i]) * (1 + scale * ties[i])
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
        result.append(pick + knapsack.lowest[i])
        spent = tuple(a + b for a, b in zip(spent, options[i][pick], strict=True))
    if not exact and not knapsack.feasible(result):
        raise InfeasibleError("floor and budget are closer than the grid of costs resolves: widen them")
    return result
