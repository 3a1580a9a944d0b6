"""EvoPress for a whole range of budgets: a population along the front, whose members feed their neighbours."""

from __future__ import annotations

from typing import Any

from evo_hpo.search.searcher import Searcher, passes_on
from evo_hpo.space.compression_space import CompressionSpace
from searchers.evopress.evopress import EvoPress
from searchers.evopress.offspring import Candidate
from searchers.fronts.interleaved import Interleaved

OWN = 6
"""Offspring of its own parent for one of each neighbour's, on average (on two synthetic problems, 8 seeds: 1 and 2 are
worse than no neighbours, 6 and 14 better)."""


@passes_on(EvoPress)
class EvoPressFront(Interleaved):
    """A search by EvoPress at each of several budgets; offspring descend from the own parent or a neighbour's.

    A neighbour's parent is brought to the own budget by the least number of level steps, ties at random.

    Args:
        budgets: members of the population: how many, evenly spaced over the range, both ends among them.
        settings: those of ``evopress``.
    """

    def __init__(self, space: CompressionSpace, *, seed: int = 0, budgets: int = 11, **settings: Any) -> None:
        super().__init__(space, seed=seed, budgets=budgets)
        self._settings = settings
        self.population: list[_Member] = []
        self.asks_for_sensitivities = self.inner[0].asks_for_sensitivities

    def make(self, space: CompressionSpace) -> Searcher:
        member = _Member(space, self.population, seed=int(self.rng.integers(2**31)), **self._settings)
        self.population.append(member)
        return member


class _Member(EvoPress):
    """EvoPress at one budget, beside others."""

    def __init__(self, space: CompressionSpace, population: list[_Member], **settings: Any) -> None:
        super().__init__(space, **settings)
        self._population, self._place = population, len(population)

    def breeders(self) -> list[Candidate]:
        """Its own parents, and those of both neighbours that have finished a generation, at its own budget."""
        if not self.generation:
            return self.parents
        near = self._population[max(0, self._place - 1) : self._place + 2]
        guests = [p for member in near if member is not self and member.generation for p in member.parents]
        fitted = [self.space.repair(p.levels, self.rng, fill=True) for p in guests]
        return [*self.parents * OWN, *(self.tried.candidate(levels) for levels in fitted)]
