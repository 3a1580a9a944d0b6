"""How EvoPress makes an offspring: small named strategies, each a function of a parent and a random stream.

All keep the budget. The distributions follow EvoPress (arXiv 2410.14649, section 3.2 and appendix); :class:`Exchange`
is ours: level switches inside groups of equal size can never move budget from one group to another.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from evo_hpo.search.searcher import one_of, probability
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from evo_hpo.space.knapsack import Cursor, Knapsack

if TYPE_CHECKING:
    from numpy.random import Generator

ATTEMPTS = 64  # random picks before looking at every unit
MOST_CHANGES = 10  # of the unrestricted switch, as published
TAIL = 2.5  # exponent of the heavy-tailed number of switches
LEAST_RETURNED = 0.8  # share of the freed cost that the unrestricted switch must spend again, as published


class Uniforms:
    """A stream of random integers, drawn from the generator in blocks: twenty times cheaper than one at a time."""

    def __init__(self, rng: Generator, block: int = 4096) -> None:
        self._rng = rng
        self._block = block
        self._buffer: list[float] = []

    def below(self, n: int) -> int:
        """An integer in 0..n-1, uniform."""
        if not self._buffer:
            self._buffer = self._rng.random(self._block).tolist()
        return int(self._buffer.pop() * n)

    def among(self, members: Sequence[int]) -> Iterator[int]:
        """Members for ever, each uniform; draws nothing before it is asked."""
        n = len(members)
        while True:
            if not self._buffer:
                self._buffer = self._rng.random(self._block).tolist()
            yield members[int(self._buffer.pop() * n)]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        if not self._buffer:
            self._buffer = self._rng.random(self._block).tolist()
        return self._buffer.pop() < probability


SwitchCount = Callable[[Uniforms], int]
Mutation = Callable[[Assignment, Uniforms, int], Assignment | None]
"""(parent, stream, number of switches) -> offspring, or None where this draw led to none."""


def switch_counts(rule: str, most: int) -> SwitchCount:
    """Number of switches an offspring takes: ``min_of_two`` uniform draws from 1..most, or ``fixed`` at most.

    Raises:
        InvalidSettingError: another rule.
    """
    if one_of("switch_rule", rule, "min_of_two", "fixed") == "min_of_two":  # P(1, 2, 3) = 5/9, 3/9, 1/9 for most = 3
        return lambda stream: 1 + min(stream.below(most), stream.below(most))
    return lambda stream: most


def heavy_tailed(most: int) -> SwitchCount:
    """Number of switches r from 1..most with probability proportional to r^-2.5: mostly few, now and then very many.

    A power law leaves local optima without giving up the neighbourhood (Doerr, Le, Makhmara, Nguyen, "Fast Genetic
    Algorithms", GECCO 2017, whose exponents are above 1).
    """
    shares = list(itertools.accumulate(r**-TAIL for r in range(1, most + 1)))
    fine = 2**30
    return lambda stream: 1 + bisect.bisect_right(shares, stream.below(fine) / fine * shares[-1])


def mutation(space: CompressionSpace, group: str, cross_group: float) -> Mutation:
    """The mutation that the settings name.

    ``group`` is ``size``, ``name`` or ``none``; with several groups, an offspring is made by cross-group exchanges
    with probability ``cross_group``. Where the steps of a group differ in cost (levels of 2, 4 and 8 bits), a switch
    seldom meets the budget; what it fails to make is made by exchanges within a group.

    Raises:
        InvalidSettingError: a value outside the above.
    """
    one_of("group", group, "size", "name", "none")
    cross_group = probability("cross_group", cross_group)
    within = UnrestrictedSwitch(space) if group == "none" else _within_groups(space, group)
    several = group != "none" and len(space.groups(group)) > 1
    if not several or not cross_group:
        return within
    across = Exchange(space)
    return lambda parent, stream, switches: (across if stream.chance(cross_group) else within)(parent, stream, switches)


def _within_groups(space: CompressionSpace, rule: str) -> Mutation:
    """Level switches, and exchanges within a group where steps differ in cost and no switch was made."""
    switch = LevelSwitch(space, rule)
    if all(equal for _, equal in switch.groups):
        return switch
    exchange = Exchange(space, rule)
    return lambda parent, stream, switches: switch(parent, stream, switches) or exchange(parent, stream, switches)


class LevelSwitch:
    """The published mutation: one unit of a group a level down, another one a level up.

    A group is picked with probability proportional to its number of units, then a unit that can go down and a different
    one that can go up, both uniformly.
    """

    def __init__(self, space: CompressionSpace, rule: str = "size") -> None:
        self.knapsack = space.knapsack
        self.groups = [(members, _equal_steps(space.knapsack, members)) for members in space.groups(rule).values()]
        self._group_of_pick = [g for g in self.groups for _ in g[0]]  # uniform pick = proportional to size

    def __call__(self, parent: Assignment, stream: Uniforms, switches: int) -> Assignment | None:
        """An offspring after ``switches`` switches, or None where a group had none."""
        if not self._group_of_pick:
            return None
        levels = list(parent)
        exact = True
        for _ in range(switches):
            members, equal = self._group_of_pick[stream.below(len(self._group_of_pick))]
            down = _pick(members, levels, self.knapsack.lowest, -1, stream)
            up = _pick(members, levels, self.knapsack.highest, down, stream) if down >= 0 else -1
            if up < 0:
                return None
            levels[down] -= 1
            levels[up] += 1
            exact = exact and equal
        offspring = tuple(levels)
        return offspring if exact or self.knapsack.feasible(offspring) else None


class UnrestrictedSwitch:
    """The published mutation without groups: raises anywhere, then lowers anywhere until the budget holds again.

    Rejected where more than 10 levels change in all, or less than 0.8 of the cost that was freed is spent again.
    """

    def __init__(self, space: CompressionSpace) -> None:
        self.knapsack = space.knapsack
        self.members = space.knapsack.free

    def __call__(self, parent: Assignment, stream: Uniforms, switches: int) -> Assignment | None:
        """An offspring that starts with ``switches`` raises, or None where it was rejected."""
        if not self.members:
            return None
        cursor = self.knapsack.first.cursor(parent)
        raised: set[int] = set()
        before = cursor.slack
        for _ in range(switches):
            up = _pick(self.members, cursor.levels, self.knapsack.highest, -1, stream)
            if up < 0:
                return None
            cursor.step(up)
            raised.add(up)
        added = before - cursor.slack
        changes = switches
        while cursor.slack < 0:
            down = _pick(self.members, cursor.levels, self.knapsack.lowest, -1, stream, barred=raised)
            if down < 0 or changes >= MOST_CHANGES:
                return None
            cursor.step(down, -1)
            changes += 1
        removed = added + cursor.slack - before
        return _offspring(self.knapsack, cursor) if added >= LEAST_RETURNED * removed else None


class Exchange:
    """Moves budget between units of unequal steps; with ``rule`` "none", between groups, so that no share is frozen.

    With another rule a group keeps about its share: what an exchange leaves unspent, another group's may spend.

    An exchange raises a unit and lowers others until the budget holds. What is left in the end is spent by raising
    units that were not lowered, in random order, while they fit, so the offspring stays close to the budget. Units of
    unequal size make an exchange change more units than a switch does, so an offspring takes half as many, rounded up:
    the more units change at once, the more seldom all of it is good.

    Args:
        space: of the assignments.
        rule: all units of an offspring are of one group of this rule, picked with probability proportional to its size.
    """

    def __init__(self, space: CompressionSpace, rule: str = "none") -> None:
        self.knapsack = space.knapsack
        self._first = space.knapsack.first  # what an exchange spends
        self.groups = list(space.groups(rule).values())
        self._group_of_pick = [g for g in self.groups for _ in g]

    def unspent(self, parent: Assignment) -> bool:
        """True where the budget pays for another step of some unit."""
        cursor = self._first.cursor(parent)
        return cursor.slack >= self.knapsack.least_step and any(map(cursor.fits, self.knapsack.free))

    def __call__(self, parent: Assignment, stream: Uniforms, switches: int) -> Assignment | None:
        """An offspring after half of ``switches`` exchanges, rounded up, or None where units ran out."""
        if not self.groups:
            return None
        members = self.groups[0]
        if len(self.groups) > 1:
            members = self._group_of_pick[stream.below(len(self._group_of_pick))]
        knapsack = self._first
        cursor, lowest, highest = knapsack.cursor(parent), knapsack.lowest, knapsack.highest
        levels = cursor.levels
        raised: set[int] = set()
        lowered: set[int] = set()
        for _ in range((switches + 1) // 2):
            up = _pick(members, levels, highest, -1, stream, barred=lowered)
            if up < 0:
                return None
            cursor.step(up)
            raised.add(up)
            while cursor.slack < 0:
                down = _pick(members, levels, lowest, -1, stream, barred=raised)
                if down < 0:
                    return None
                cursor.step(down, -1)
                lowered.add(down)
        if cursor.slack >= knapsack.least_step:  # else nothing more fits
            picks = itertools.islice(stream.among(members), ATTEMPTS)
            cursor.spend(itertools.filterfalse(lowered.__contains__, picks), knapsack.least_step)
        return _offspring(self.knapsack, cursor)


def _offspring(knapsack: Knapsack, cursor: Cursor) -> Assignment | None:
    """Where a walk in the first resource ended, if all resources allow it."""
    levels = cursor.assignment()
    return levels if not knapsack.several or (levels and knapsack.feasible(levels)) else None


def _pick(
    members: Sequence[int],
    levels: Sequence[int],
    limits: Sequence[int],
    other: int,
    stream: Uniforms,
    barred: set[int] | frozenset[int] = frozenset(),
) -> int:
    """A uniform pick among members that are not at their limit, not ``other`` and not barred; -1: there is none."""
    n = len(members)
    for _ in range(ATTEMPTS):
        i = members[stream.below(n)]
        if levels[i] != limits[i] and i != other and i not in barred:
            return i
    able = [i for i in members if levels[i] != limits[i] and i != other and i not in barred]
    return able[stream.below(len(able))] if able else -1


def _equal_steps(knapsack: Knapsack, members: Sequence[int]) -> bool:
    """True where all steps of all members cost the same, so that a switch needs no check."""
    if knapsack.several:
        return False
    return len({b - a for i in members for a, b in itertools.pairwise(knapsack.first_costs[i])}) <= 1
