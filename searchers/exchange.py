"""Feasible moves between assignments: level steps exchanged between any units, of one size or not, as slack allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.random import Generator

from evo_hpo.space.compression_space import Assignment, CompressionSpace

__all__ = ["Exchanges"]

TRIES = 20


class Exchanges:
    """Random and systematic neighbours of an assignment; every one is feasible.

    Args:
        space: where the neighbours lie.
        rule: between which units steps are exchanged: ``none`` (any), ``size`` or ``name`` (within groups).
    """

    def __init__(self, space: CompressionSpace, rule: str = "none") -> None:
        self.space = space
        self.free = [i for i in range(len(space)) if space.lowest[i] < space.highest[i]]
        self.groups = list(space.groups(rule).values())
        self.peers = {i: np.array(members) for members in self.groups for i in members}
        self.costs = [[level[0] for level in unit] for unit in space.vectors]
        self.least_step = space.least_step

    def fits(self, levels: Sequence[int]) -> bool:
        """True when no resource is over its budget."""
        space = self.space
        if space.dimensions == 1:
            return space.cost(levels) <= space.budget
        return all(c <= b for c, b in zip(space.costs(levels), space.budgets, strict=True))

    def random(self, levels: Assignment, rng: Generator) -> Assignment | None:
        """A random unit a step up or down, paid by, or spent on, random units of its group; None: none was found."""
        if not self.free:
            return None
        for _ in range(TRIES):
            current = list(levels)
            unit = self.free[int(rng.integers(len(self.free)))]
            up = bool(rng.random() < 0.5)
            limit = self.space.highest[unit] if up else self.space.lowest[unit]
            if current[unit] == limit:
                continue
            current[unit] += 1 if up else -1
            peers = [i for i in rng.permutation(self.peers[unit]).tolist() if i != unit]
            if up:
                peers = self._pay(current, peers)
            self._spend(current, peers)
            if tuple(current) != levels and self.space.feasible(current):
                return tuple(current)
        return None

    def _pay(self, current: list[int], peers: list[int]) -> list[int]:
        """Lowers peers by a step each, in order, until the budget holds; the peers that were left alone."""
        for n, i in enumerate(peers):
            if self.fits(current):
                return peers[n:]
            if current[i] > self.space.lowest[i]:
                current[i] -= 1
        return []

    def _spend(self, current: list[int], peers: Sequence[int]) -> None:
        """Raises peers by a step each, in order, as far as the budget allows."""
        slack = self.space.slack(current)
        for i in peers:
            if slack < self.least_step:
                return
            if current[i] >= self.space.highest[i]:
                continue
            step = self.costs[i][current[i] + 1] - self.costs[i][current[i]]
            if step <= slack:
                current[i] += 1
                if self.fits(current):
                    slack -= step
                else:
                    current[i] -= 1

    def walk(self, levels: Assignment, steps: int, rng: Generator) -> Assignment:
        """``steps`` random exchanges, one after the other."""
        for _ in range(steps):
            levels = self.random(levels, rng) or levels
        return levels

    def neighbours(self, levels: Assignment, rng: Generator) -> Iterator[Assignment]:
        """All of: one unit a step up, one a step down, and both at once within a group; in random order."""
        moves = [(i, -1) for i in self.free] + [(-1, i) for i in self.free]
        for members in self.groups:
            moves += [(i, j) for i in members for j in members if i != j]
        for index in rng.permutation(len(moves)).tolist():
            down, up = moves[index]
            if (down >= 0 and levels[down] <= self.space.lowest[down]) or (
                up >= 0 and levels[up] >= self.space.highest[up]
            ):
                continue
            current = list(levels)
            if down >= 0:
                current[down] -= 1
            if up >= 0:
                current[up] += 1
            if self.space.feasible(current):
                yield tuple(current)
