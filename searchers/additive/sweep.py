"""Exact minimisation of an additive loss at every budget of a range at once: one pass of dynamic programming.

The table of :mod:`searchers.additive.solvers` ends at one budget; this one is filled from the first unit to the last,
so that its last row holds the least loss of every total cost, and each of them is traced back.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from evo_hpo.search.checkpoint import front_of
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from evo_hpo.space.ranges import at, marks
from searchers.additive.solvers import MOST_CELLS, Effects, solve


def sweep(space: CompressionSpace, effects: Effects) -> list[Assignment]:
    """Of all feasible assignments those that lose less than every cheaper one, ascending in cost.

    Exact where costs are on a grid that the table holds; finer costs are rounded up to it. With several resources, the
    solutions at the marks of the range.

    Args:
        effects: loss of each unit's levels; ``inf`` forbids a level.
    """
    if space.knapsack.several:
        solved = (solve(at(space, mark), effects) for mark in marks(space))
        return _front(space, effects, [levels for levels in solved if levels is not None])
    counter = space.knapsack.counter
    width = counter.budgets[0] + 1
    grid = -(-width * len(space) // MOST_CELLS)
    width = (width - 1) // grid + 1
    best = np.full(width, np.inf)
    best[0] = 0.0
    choices = np.zeros((len(space), width), dtype=np.min_scalar_type(max(map(len, counter.options)) - 1))
    steps = [[-(-level[0] // grid) for level in unit] for unit in counter.options]
    for u, low in enumerate(space.lowest):
        following = np.full(width, np.inf)
        for k, step in enumerate(steps[u]):
            loss = effects[u][low + k]
            if step >= width or loss == np.inf:
                continue
            candidate, target = best[: width - step] + loss, following[step:]
            better = candidate < target
            np.copyto(target, candidate, where=better)
            np.copyto(choices[u, step:], k, where=better, casting="unsafe")
        best = following
    ended = np.flatnonzero(np.isfinite(best) & (np.arange(width) >= counter.floors[0] // grid))
    if not len(ended):
        return []
    if grid == 1:  # rounding may have put a cheaper assignment behind a dearer one
        below = np.minimum.accumulate(np.concatenate([[np.inf], best[ended][:-1]]))
        ended = ended[best[ended] < below]
    return _front(space, effects, _traced(space, choices, steps, ended))


def _traced(
    space: CompressionSpace, choices: np.ndarray[Any, Any], steps: list[list[int]], ended: np.ndarray[Any, Any]
) -> list[Assignment]:
    """The assignments that end at these costs."""
    spent, levels = ended.copy(), np.zeros((len(ended), len(space)), dtype=int)
    for u in range(len(space) - 1, -1, -1):
        picked = choices[u, spent].astype(int)
        levels[:, u] = picked + space.lowest[u]
        spent -= np.array(steps[u])[picked]
    return [tuple(row) for row in levels.tolist()]


def _front(space: CompressionSpace, effects: Effects, found: list[Assignment]) -> list[Assignment]:
    """The feasible ones that lose less than every cheaper one, ascending in cost."""
    losses = {a: sum(effects[u][k] for u, k in enumerate(a)) for a in found if space.feasible(a)}
    return front_of(space, losses)
