"""Feasible moves between assignments: level steps exchanged between any units, of one size or not, as slack allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.random import Generator

from evo_hpo.space.compression_space import Assignment, CompressionSpace

TRIES = 20


class Moves:
    """Random and systematic neighbours of an assignment; every one is feasible.

    Args:
        space: where the neighbours lie.
        rule: between which units steps are exchanged: ``none`` (any), ``size`` or ``name`` (within groups).
    """

    def __init__(self, space: CompressionSpace, rule: str = "none") -> None:
        self.knapsack = space.knapsack
        self.free = list(space.knapsack.free)
        self.groups = list(space.groups(rule).values())
        self.peers = {i: np.array(members) for members in self.groups for i in members}

    def random(self, levels: Assignment, rng: Generator) -> Assignment | None:
        """A random unit a step up or down, paid by, or spent on, random units of its group; None: none was found."""
        if not self.free:
            return None
        for _ in range(TRIES):
            unit = self.free[int(rng.integers(len(self.free)))]
            by, limits = (1, self.knapsack.highest) if rng.random() < 0.5 else (-1, self.knapsack.lowest)
            if levels[unit] == limits[unit]:
                continue
            cursor = self.knapsack.cursor(levels)
            cursor.step(unit, by)
            peers: Sequence[int] = [i for i in rng.permutation(self.peers[unit]).tolist() if i != unit]
            if by > 0:
                peers = cursor.pay(peers)
            cursor.spend(peers, self.knapsack.least_step)
            if (found := cursor.assignment()) is not None and found != levels:
                return found
        return None

    def walk(self, levels: Assignment, steps: int, rng: Generator) -> Assignment:
        """``steps`` random exchanges, one after the other."""
        for _ in range(steps):
            levels = self.random(levels, rng) or levels
        return levels

    def neighbours(self, levels: Assignment, rng: Generator) -> Iterator[Assignment]:
        """All of: one unit a step up, one a step down, and both at once within a group; in random order."""
        cursor = self.knapsack.cursor(levels)
        for index in rng.permutation(len(self._moves)).tolist():
            if (found := cursor.peek(*self._moves[index])) is not None:
                yield found

    @cached_property
    def _moves(self) -> list[tuple[tuple[int, int], ...]]:
        """Single steps down, single steps up, and pairs of one down and one up within a group."""
        downs, ups = ({i: (i, by) for i in self.free} for by in (-1, +1))
        pairs = [(downs[i], ups[j]) for members in self.groups for i, j in itertools.permutations(members, 2)]
        return [*((step,) for step in downs.values()), *((step,) for step in ups.values()), *pairs]
