"""How the proposals of optimizers that know no budget become feasible assignments.

A foreign optimizer moves in its own coordinates, one for each unit that may change: an integer level, or a continuous
key. An encoding turns a proposal into the feasible assignment that is scored, and says which point the optimizer is
told the loss of. Which encoding is used matters more than which optimizer; ``docs/encodings.md`` has the measurements.

=============== =========== ============================================ ====================================
name            coordinates the assignment that is scored                what the optimizer is told
=============== =========== ============================================ ====================================
repaired        levels      random steps to the budget                   the repaired point
projection      levels      nearest (Euclid), ties at random             the projected point
native          levels      nearest (Euclid), ties fixed in the search   its own point
penalty         levels      as ``native``                                its own point, loss + penalty
set_constraint  levels      as ``native``                                its own point, marked infeasible
keys            keys        budget poured over units in order of keys    its own point
sequential      levels      as proposed: each unit is offered only the   the assignment
                            levels that the rest of the budget allows
=============== =========== ============================================ ====================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from evo_hpo.search.searcher import one_of
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from evo_hpo.space.knapsack import Cursor

Point = tuple[float, ...]
"""One coordinate a unit that may change."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What became of a proposal.

    Attributes:
        levels: the feasible assignment to score.
        told: the point whose loss the optimizer is told.
        excess: by how much the proposal was over the budget, as a fraction of it; 0 where it was within.
    """

    levels: Assignment
    told: Point
    excess: float = 0.0


class Encoding(ABC):
    """Coordinates of the units that may change, and the way from a proposal to an assignment.

    Args:
        space: where the assignments are feasible.
        rng: for random repairs and ties.
        fill: spend what a repair or a modest proposal leaves of the budget.
    """

    name: ClassVar[str]
    continuous: ClassVar[bool] = False
    """True: coordinates are keys in [0, 1]; False: integer levels."""
    one_to_one: ClassVar[bool] = False
    """True: the same point always gives the same assignment."""

    def __init__(self, space: CompressionSpace, rng: Generator, *, fill: bool = True) -> None:
        self.space = space
        self.rng = rng
        self.fill = fill
        self.knapsack = space.knapsack
        self.free = space.knapsack.free
        """The units that may change, in the order of the coordinates."""
        self.low = tuple(space.lowest[i] for i in self.free)
        self.high = tuple(space.highest[i] for i in self.free)
        self._enough = -1 if fill else space.knapsack.room[0]  # slack at which steps up end; -1: when nothing fits
        self._seed = int(rng.spawn(1)[0].integers(2**31))

    @abstractmethod
    def decode(self, point: Sequence[float]) -> Decoded:
        """The assignment for a proposal."""

    def encode(self, levels: Assignment) -> Point:
        """A point whose assignment is ``levels``, or as near as filling the budget allows."""
        return tuple(float(levels[i]) for i in self.free)

    # ------------------------------------------------------------------ for subclasses

    def _levels(self, point: Sequence[float]) -> list[int]:
        """The proposal as levels of all units, rounded into range; feasible or not."""
        levels = list(self.space.lowest)
        for i, x, low, high in zip(self.free, point, self.low, self.high, strict=True):
            levels[i] = min(max(round(float(x)), low), high)
        return levels

    def _excess(self, levels: Sequence[int]) -> float:
        """Largest relative excess over a resource's budget, or shortfall below a floor."""
        worst = 0.0
        for cost, budget, floor in zip(self.space.costs(levels), self.space.budgets, self.space.floors, strict=True):
            worst = max(worst, (cost - budget) / max(budget, 1), (floor - cost) / max(floor, 1))
        return worst

    def _settle(self, levels: list[int]) -> Assignment:
        """The levels, or where several resources or a floor still object, the nearest assignment that they allow."""
        fill = self.knapsack.several and self.fill
        if not fill and self.space.feasible(levels):
            return tuple(levels)
        ties = np.random.default_rng(self._seed) if self.one_to_one else self.rng
        return self.space.repair(levels, ties, fill=fill)

    def _walk(self, levels: list[int], steps: Callable[[Cursor, int], None]) -> Assignment:
        """The levels settled; with one resource, after ``steps`` down to the budget (by -1) and up to it (by 1)."""
        if not self.knapsack.several:
            cursor = self.knapsack.cursor(levels)
            if cursor.slack < 0:
                steps(cursor, -1)
            if cursor.slack > max(self._enough, 0):
                steps(cursor, +1)
            levels = cursor.levels
        return self._settle(levels)


class Repaired(Encoding):
    """Random single steps down to the budget (and up to it); told the repaired point."""

    name = "repaired"

    def decode(self, point: Sequence[float]) -> Decoded:
        """Steps of units drawn uniformly from those that can still take one."""
        levels = self._levels(point)
        settled = self._walk(levels, self._steps)
        return Decoded(settled, self.encode(settled), self._excess(levels))

    def _steps(self, cursor: Cursor, by: int) -> None:
        """Random steps down until nothing is over the budget, or up until nothing more fits or has to."""
        pool = [i for i in self.free if cursor.can(i, by)]
        draws: list[float] = []
        while pool and (cursor.slack > self._enough if by > 0 else cursor.slack < 0):
            if not draws:
                draws = self.rng.random(len(pool) + 8).tolist()
            pick = int(draws.pop() * len(pool))
            fits = by < 0 or cursor.fits(pool[pick])
            if fits:
                cursor.step(pool[pick], by)
            if not fits or not cursor.can(pool[pick], by):
                pool[pick] = pool[-1]
                pool.pop()


class Projection(Encoding):
    """The nearest assignment within the budget (greedy in squared distance for the cost), ties at random."""

    name = "projection"

    def decode(self, point: Sequence[float]) -> Decoded:
        """Fresh ties each time; told the projected point."""
        excess = self._excess(self._levels(point))
        settled = self._project(point, self.rng.random(len(self.free)).tolist())
        return Decoded(settled, self.encode(settled), excess)

    def _project(self, point: Sequence[float], ties: Sequence[float]) -> Assignment:
        wish, order = dict(zip(self.free, point, strict=True)), dict(zip(self.free, ties, strict=True))

        def steps(cursor: Cursor, by: int) -> None:
            """Steps in order of added squared distance for each unit of cost."""
            cursor.follow(by, lambda i, by: 2 * by * (cursor.levels[i] - float(wish[i])) + 1, order, self._enough)

        return self._walk(self._levels(point), steps)


class Native(Projection):
    """As ``projection``, but the optimizer is told its own point, and equal proposals give equal assignments."""

    name = "native"
    one_to_one = True

    def __init__(self, space: CompressionSpace, rng: Generator, *, fill: bool = True) -> None:
        super().__init__(space, rng, fill=fill)
        self._ties = rng.random(len(self.free)).tolist()  # fixed, but in no order of position

    def decode(self, point: Sequence[float]) -> Decoded:
        told = tuple(map(float, point))
        return Decoded(self._project(point, self._ties), told, self._excess(self._levels(point)))


class Penalty(Native):
    """As ``native``; the loss told grows with the proposal's excess over the budget."""

    name = "penalty"


class SetConstraint(Native):
    """As ``native``; the optimizer is told by how much the proposal broke the budget (Optuna's constraints)."""

    name = "set_constraint"


class Keys(Encoding):
    """Random keys and water-filling: the budget is poured over the units in the order of their keys.

    A unit with key x and L + 1 levels wishes for level x L; its step from level k to k + 1 has priority x L - k, and
    steps are taken in descending priority while they fit. So all keys rise or sink together until the budget is spent.
    """

    name = "keys"
    continuous = True
    one_to_one = True

    def decode(self, point: Sequence[float]) -> Decoded:
        """Pours from the cheapest assignment; told its own point."""
        steps = sorted(
            (k - x * (high - low), i, low + k)
            for i, x, low, high in zip(self.free, map(float, point), self.low, self.high, strict=True)
            for k in range(high - low)
        )
        cursor = self.knapsack.cursor(self.knapsack.lowest)
        for _, i, level in steps:
            if cursor.levels[i] == level and cursor.eases(i):
                cursor.step(i)
        return Decoded(self._settle(cursor.levels), tuple(map(float, point)))

    def encode(self, levels: Assignment) -> Point:
        """Keys that wish for exactly these levels."""
        return tuple(
            (levels[i] - low) / (high - low) for i, low, high in zip(self.free, self.low, self.high, strict=True)
        )


class Sequential(Encoding):
    """Units are offered one after the other, in a fresh random order, what the rest of the budget allows."""

    name = "sequential"

    def decode(self, point: Sequence[float]) -> Decoded:
        """The point itself; settled only where several resources, or a floor between gaps, make the ranges too wide."""
        settled = self._settle(self._levels(point))
        return Decoded(settled, self.encode(settled))

    def suggest(self, offer: Callable[[int, int, int], int]) -> Decoded:
        """Calls ``offer(coordinate, low, high)`` for each unit and returns the assignment of its answers."""
        counter = self.knapsack.counter
        most = list(counter.budgets)  # what may still be spent above the cheapest levels
        least = [f - t for f, t in zip(counter.floors, counter.totals, strict=True)]  # and below the dearest
        point = [0] * len(self.free)
        for position in self.rng.permutation(len(self.free)).tolist():
            low, options = self.low[position], counter.options[self.free[position]]
            dearest = list(map(max, zip(*options, strict=True)))
            allowed = [
                k
                for k, costs in enumerate(options, low)
                if all(c <= m and c - d >= f for c, m, d, f in zip(costs, most, dearest, least, strict=True))
            ] or [low]
            level = point[position] = offer(position, allowed[0], allowed[-1])
            most = [m - c for m, c in zip(most, options[level - low], strict=True)]
            least = [f - c + d for f, c, d in zip(least, options[level - low], dearest, strict=True)]
        return self.decode(point)


ENCODINGS: dict[str, type[Encoding]] = {
    cls.name: cls for cls in (Repaired, Projection, Native, Penalty, SetConstraint, Keys, Sequential)
}
"""Encodings by name."""


def make_encoding(
    name: str, space: CompressionSpace, rng: Generator, *, fill: bool = True, allowed: Sequence[str] = tuple(ENCODINGS)
) -> Encoding:
    """An encoding by name.

    Raises:
        InvalidSettingError: no such encoding, or not one of ``allowed``.
    """
    return ENCODINGS[one_of("encoding", name, *allowed)](space, rng, fill=fill)
