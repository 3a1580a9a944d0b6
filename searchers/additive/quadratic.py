"""A quadratic model of the loss, with cross terms between units, and its minimisation under the budget.

The cross terms are of low rank: each factor is a number for every unit and level, summed over the units and squared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.solvers import solve
from searchers.moves import Moves

Array = np.ndarray[Any, np.dtype[Any]]

LEAST = 1e-12  # of the model's scale: a gain below it is rounding


@dataclass(frozen=True, eq=False)
class Quadratic:
    """loss(a) = sum_u effects[u, a_u] + sum_r weights[r] (sum_u factors[r, u, a_u])^2 / 2.

    Attributes:
        effects: units x levels; not finite: the unit may not take the level.
        factors: rank x units x levels; finite.
        weights: of each factor, of either sign.
    """

    effects: Array
    factors: Array
    weights: Array

    def __call__(self, levels: Assignment) -> float:
        """The modelled loss, lower is better."""
        rows = np.arange(len(levels))
        sums = self.factors[:, rows, list(levels)].sum(axis=1)
        return float(self.effects[rows, list(levels)].sum() + self.weights @ np.square(sums) / 2)

    def moves(self, levels: Assignment) -> tuple[Array, Array]:
        """What changing one unit changes: the loss (units x levels), and the factors (rank x units x levels)."""
        rows = np.arange(len(levels))
        at = self.factors[:, rows, list(levels)]
        changed = self.factors - at[:, :, None]
        linear = np.tensordot(self.weights * at.sum(axis=1), changed, 1)
        squares = np.tensordot(self.weights, np.square(changed), 1) / 2
        return self.effects - self.effects[rows, list(levels)][:, None] + linear + squares, changed


def minimise(
    space: CompressionSpace,
    model: Quadratic,
    start: Assignment,
    rng: Generator,
    *,
    centre: Assignment | None = None,
    changes: int | None = None,
    kicks: int = 8,
) -> Assignment:
    """The best assignment that a local search finds, the start included.

    It descends by the exact knapsack over what each unit changes alone, within fewer and fewer changed units, and where
    that no longer helps by the best change of one or two units; and again from random exchanges around the best.

    Args:
        start: feasible, of levels that the model knows, and at most ``changes`` units other than in the centre.
        centre: counted from here; None: the start.
        changes: the most units that may differ from the centre; None: any number.
        kicks: descents from random exchanges.
    """
    search = _Descent(space, model, centre or start, changes)
    best = search.descend(start)
    moves = Moves(space)
    for number in range(kicks if moves.free else 0):
        kicked = moves.walk(best, 2 + number % 4, rng)
        if search.allowed(kicked) and model(found := search.descend(kicked)) < model(best) - search.least:
            best = found
    return best


class _Descent:
    def __init__(self, space: CompressionSpace, model: Quadratic, centre: Assignment, changes: int | None) -> None:
        self.space, self.model, self.centre, self.changes = space, model, centre, changes
        counter = space.knapsack.counter
        shape = (len(counter.budgets) + 1, *model.effects.shape)
        self.costs = np.zeros(shape, dtype=np.asarray(counter.budgets).dtype)
        self.open = np.zeros(model.effects.shape, dtype=bool)
        for u, (options, low) in enumerate(zip(counter.options, space.lowest, strict=True)):
            self.costs[:-1, u, low : low + len(options)] = np.array(options).T
            self.open[u, low : low + len(options)] = True
        self.costs[-1] = np.arange(shape[2]) != np.array(centre)[:, None]  # units other than in the centre
        self.open &= np.isfinite(model.effects)
        self.budgets = [*counter.budgets, len(space) if changes is None else changes]
        self.floors = [*counter.floors, 0]
        finite = np.where(self.open, model.effects, 0.0)
        self.least = LEAST * max(
            1e-300, float(np.abs(finite).sum() + (abs(model.weights) @ (model.factors**2).sum((1, 2))))
        )

    def allowed(self, levels: Assignment) -> bool:
        """Feasible, near enough to the centre, and of levels that the model knows."""
        rows = np.arange(len(levels))
        near = self.changes is None or int(self.costs[-1][rows, list(levels)].sum()) <= self.changes
        return near and self.space.feasible(levels) and bool(self.open[rows, list(levels)].all())

    def descend(self, levels: Assignment) -> Assignment:
        """To an assignment that neither kind of step improves."""
        while (better := self._by_knapsack(levels) or self._by_pair(levels)) is not None:
            levels = better
        return levels

    def _by_knapsack(self, levels: Assignment) -> Assignment | None:
        """An improvement among the exact solutions for what units change alone, the largest number of them first."""
        alone = self.model.moves(levels)[0]
        effects = np.where(self.open, alone, np.inf).tolist()
        count = len(self.space) if self.changes is None else self.changes
        loss = self.model(levels) - self.least
        while count > 2:
            found = solve(self.space, effects, start=levels, changes=count, exact=False)
            if found is not None and self.allowed(found) and self.model(found) < loss:
                return found
            count = min(count // 2, sum(a != b for a, b in zip(found, levels, strict=True)) if found else count)
        return None

    def _by_pair(self, levels: Assignment) -> Assignment | None:
        """The best change of one or two units, where it is an improvement."""
        rows = np.arange(len(levels))
        alone, changed = self.model.moves(levels)
        units, choices = np.nonzero(self.open & (np.arange(alone.shape[1]) != np.array(levels)[:, None]))
        changed = changed[:, units, choices]
        extra = self.costs[:, units, choices] - self.costs[:, rows, list(levels)][:, units]
        spent = self.costs[:, rows, list(levels)].sum(axis=1)
        alone = alone[units, choices]
        gains = alone[:, None] + alone[None, :] + (changed.T * self.model.weights) @ changed
        gains[units[:, None] == units[None, :]] = np.inf
        np.fill_diagonal(gains, alone)  # one unit by itself
        for cost, budget, floor, now in zip(extra, self.budgets, self.floors, spent, strict=True):
            after = now + cost[:, None] + cost[None, :]
            np.fill_diagonal(after, now + cost)
            gains[(after > budget) | (after < floor)] = np.inf
        if not gains.size or not (best := np.unravel_index(np.argmin(gains), gains.shape)) or gains[best] > -self.least:
            return None
        found = list(levels)
        for option in best:
            found[int(units[option])] = int(choices[option])
        return tuple(found)
