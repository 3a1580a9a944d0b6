"""What may be chosen at which cost, and walks through it by single level steps.

A knapsack knows no names, groups or sizes: only the exact costs of every unit's levels, and what all of them together
may cost. A cursor of it is an assignment on its way: it follows what is spent, and knows which steps are allowed.
"""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from evo_hpo.space.counting import Counter

Assignment = tuple[int, ...]
"""One level index per unit, 0 = cheapest."""

Costs = tuple[int, ...]
"""One exact integer a resource."""


@dataclass(frozen=True)
class Knapsack:
    """Costs of the levels of every unit, and limits of what an assignment may cost, for any number of resources.

    Args:
        costs: cost of each unit's levels, ascending in the first resource.
        lowest, highest: the levels that each unit may take, both included.
        budgets: the most that an assignment may cost.
        floors: the least that an assignment must cost.
    """

    costs: tuple[tuple[Costs, ...], ...]
    lowest: Assignment
    highest: Assignment
    budgets: Costs
    floors: Costs

    _last: ClassVar[tuple[Sequence[int], Costs]] = ((), ())  # the tuple that a cursor was made for last; what it leaves

    def __getstate__(self) -> dict[str, Any]:
        """The fields: the sampler's tables are hundreds of megabytes, and all else is made anew where needed."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def counter(self) -> Counter:
        """Counts, samples and enumerates the feasible assignments."""
        return Counter(self.costs, self.lowest, self.highest, self.budgets, self.floors)

    @cached_property
    def several(self) -> bool:
        """True where there is more than one resource."""
        return len(self.budgets) > 1

    @cached_property
    def first(self) -> Knapsack:
        """The knapsack of the first resource alone."""
        if not self.several:
            return self
        costs = tuple(tuple(level[:1] for level in unit) for unit in self.costs)
        return Knapsack(costs, self.lowest, self.highest, self.budgets[:1], self.floors[:1])

    @cached_property
    def first_costs(self) -> tuple[tuple[int, ...], ...]:
        """Cost of each unit's levels in the first resource."""
        return tuple(tuple(level[0] for level in unit) for unit in self.costs)

    @cached_property
    def rises(self) -> tuple[tuple[Costs, ...], ...]:
        """What each unit's steps up from each level cost more, of every resource."""
        steps = (itertools.pairwise(unit) for unit in self.costs)
        return tuple(tuple(tuple(map(operator.sub, b, a)) for a, b in unit) for unit in steps)

    @cached_property
    def widest(self) -> Costs:
        """The most that a step up or down changes of each resource."""
        steps = [step for unit in self.rises for step in unit]
        return tuple(max((abs(step[r]) for step in steps), default=0) for r in range(len(self.budgets)))

    @cached_property
    def array(self) -> tuple[Any, Any]:
        """Costs as an array (units, levels, resources), and where it holds a level that the unit may take."""
        most = max(map(len, self.costs))
        padded = [[*unit, *[unit[-1]] * (most - len(unit))] for unit in self.costs]
        small = 4 * max(max(map(max, unit)) for unit in self.costs) * len(self.costs) < 2**63
        levels, limits = np.arange(most), np.array([self.lowest, self.highest])[..., None]
        return np.array(padded, dtype=np.int64 if small else object), (limits[0] <= levels) & (levels <= limits[1])

    @cached_property
    def free(self) -> tuple[int, ...]:
        """The units that may change."""
        return tuple(i for i, (low, high) in enumerate(zip(self.lowest, self.highest, strict=True)) if low < high)

    @cached_property
    def least_step(self) -> int:
        """The least cost above 0 of a level step (first resource) of units that may change; 1: there is none."""
        steps = (b - a for i in self.free for a, b in itertools.pairwise(self.first_costs[i]) if b > a)
        return min(steps, default=1)

    @cached_property
    def _narrowed(self) -> tuple[tuple[int, int, int], ...]:
        """Units that may not take all of their levels, with their limits."""
        limits = enumerate(zip(self.costs, self.lowest, self.highest, strict=True))
        return tuple((i, low, high) for i, (unit, low, high) in limits if low > 0 or high < len(unit) - 1)

    @cached_property
    def room(self) -> Costs:
        """Budget less floor of each resource: the most that a feasible assignment leaves."""
        return tuple(map(operator.sub, self.budgets, self.floors))

    def cost(self, levels: Sequence[int]) -> int:
        """Total cost of the first resource."""
        return sum(map(operator.getitem, self.first_costs, levels))

    def spent(self, levels: Sequence[int]) -> Costs:
        """Total cost of every resource."""
        if not self.several:
            return (self.cost(levels),)
        return tuple(map(sum, zip(*map(operator.getitem, self.costs, levels), strict=True)))

    def feasible(self, levels: Sequence[int]) -> bool:
        """True when every unit has a level that it may take, and every resource is within floor and budget."""
        if len(levels) != len(self.costs) or min(levels) < 0:
            return False
        try:
            if self.several:
                within = all(f <= c <= b for f, c, b in zip(self.floors, self.spent(levels), self.budgets, strict=True))
            else:
                within = self.floors[0] <= sum(map(operator.getitem, self.first_costs, levels)) <= self.budgets[0]
        except IndexError:
            return False
        return within and all(low <= levels[i] <= high for i, low, high in self._narrowed)

    def cursor(self, levels: Sequence[int]) -> Cursor:
        """A walk that starts at an assignment; every unit must be at a level that it may take.

        What the last tuple costs is remembered, so that many walks from one parent sum its units once.
        """
        known, left = self._last
        if levels is not known:
            left = tuple(map(operator.sub, self.budgets, self.spent(levels)))
            if isinstance(levels, tuple):
                self.__dict__["_last"] = (levels, left)
        return Cursor(self, levels, left)


class Cursor:
    """An assignment on its way through a knapsack, and what it leaves of every budget.

    Attributes:
        levels: the current ones; only the methods change them.
        slack: unspent budget of the first resource; negative: over it.
    """

    __slots__ = ("_costs", "_others", "knapsack", "levels", "slack")

    def __init__(self, knapsack: Knapsack, levels: Sequence[int], left: Costs) -> None:
        self.knapsack = knapsack
        self.levels = list(levels)
        self.slack, self._others = left[0], left[1:]  # the others are () with one resource
        self._costs = knapsack.first_costs

    @property
    def left(self) -> Costs:
        """Unspent budget of every resource; negative: over it."""
        return (self.slack, *self._others)

    @property
    def within(self) -> bool:
        """True when no resource is over its budget."""
        return self.slack >= 0 and (not self._others or min(self._others) >= 0)

    @property
    def feasible(self) -> bool:
        """True when every resource is within floor and budget."""
        if not self._others:
            return 0 <= self.slack <= self.knapsack.room[0]
        return all(0 <= left <= most for left, most in zip(self.left, self.knapsack.room, strict=True))

    def assignment(self) -> Assignment | None:
        """The current levels where they are feasible."""
        return tuple(self.levels) if self.feasible else None

    def can(self, unit: int, by: int) -> bool:
        """True when the unit has a level further up (``by`` > 0) or down."""
        return self.levels[unit] != (self.knapsack.highest if by > 0 else self.knapsack.lowest)[unit]

    def after(self, unit: int, by: int) -> Costs:
        """What a step would leave of every budget."""
        costs, level = self.knapsack.costs[unit], self.levels[unit]
        return tuple(left + a - b for left, a, b in zip(self.left, costs[level], costs[level + by], strict=True))

    def fits(self, unit: int) -> bool:
        """True when there is a step up after which no resource is over its budget."""
        costs, level = self._costs[unit], self.levels[unit]
        return (
            level < self.knapsack.highest[unit]
            and costs[level + 1] - costs[level] <= self.slack
            and (not self._others or min(self.after(unit, +1)) >= 0)
        )

    def eases(self, unit: int) -> bool:
        """True when there is a step up that needs no more of any resource than there is, or than before.

        A resource that the step does not need more of is no obstacle, even if it is over its budget: keeping a module
        costs bits, but none of the modules that may be dropped.
        """
        costs, level = self._costs[unit], self.levels[unit]
        if level == self.knapsack.highest[unit] or costs[level + 1] - costs[level] > max(self.slack, 0):
            return False
        others = zip(self.after(unit, +1), self.left, strict=True) if self._others else ()
        return all(after >= min(0, left) for after, left in others)

    def allows(self, unit: int, by: int) -> bool:
        """True when there is a step after which the assignment is feasible."""
        return self.peek((unit, by)) is not None

    def peek(self, *steps: tuple[int, int]) -> Assignment | None:
        """The assignment after all of these steps (of different units) if it is feasible; the cursor stays."""
        if not all(itertools.starmap(self.can, steps)):
            return None
        for unit, by in steps:
            self.step(unit, by)
        found = self.assignment()
        for unit, by in steps:
            self.step(unit, -by)
        return found

    def step(self, unit: int, by: int = 1) -> None:
        """Moves a unit by so many levels, whatever that costs."""
        level, costs = self.levels[unit], self._costs[unit]
        if self._others:
            self._others = self.after(unit, by)[1:]
        self.levels[unit] = level + by
        self.slack += costs[level] - costs[level + by]

    def pay(self, units: Sequence[int]) -> Sequence[int]:
        """Lowers units by a step each, in order, until no resource is over its budget; the units left alone."""
        for n, unit in enumerate(units):
            if self.within:
                return units[n:]
            if self.can(unit, -1):
                self.step(unit, -1)
        return ()

    def spend(self, units: Iterable[int], least: float = -math.inf) -> None:
        """Raises units by a step each, in order, where it fits, while ``least`` of the first resource is left."""
        levels, costs, highest = self.levels, self._costs, self.knapsack.highest
        if self.slack < least:
            return
        for unit in units:
            level = levels[unit]
            if level >= highest[unit] or costs[unit][level + 1] - costs[unit][level] > self.slack:
                continue
            if not self._others or self.fits(unit):
                self.step(unit)
                if self.slack < least:
                    return

    def follow(
        self, by: int, added: Callable[[int, int], float], ties: Sequence[float] | Mapping[int, float], enough: int
    ) -> None:
        """Steps of least distance for each unit of cost moved (first resource): down while over budget, or up.

        With several resources the assignment must be feasible, and stays so.

        Args:
            by: -1: down, until the first resource is within its budget; 1: up, what fits, while more is left than
                ``enough``.
            added: distance that a step of a unit by -1 or 1 adds.
            ties: order of the units where rates are equal, one a unit; then the earlier unit.
            enough: slack at which steps up end.
        """
        costs, levels = self._costs, self.levels

        def entry(unit: int) -> tuple[float, float, int]:
            moved = abs(costs[unit][levels[unit] + by] - costs[unit][levels[unit]]) or 1
            return added(unit, by) / moved, ties[unit], unit

        heap = [entry(unit) for unit in self.knapsack.free if self.can(unit, by)]
        heapq.heapify(heap)
        while heap and (self.slack > enough if by > 0 else self.slack < 0):
            unit = heapq.heappop(heap)[2]
            if by > 0 and not (self.allows(unit, by) if self._others else self.fits(unit)):
                continue
            self.step(unit, by)
            if self.can(unit, by):
                heapq.heappush(heap, entry(unit))
