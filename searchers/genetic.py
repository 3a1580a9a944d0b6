"""A genetic algorithm whose crossover and mutation keep to the budget."""

from __future__ import annotations

from typing import Any

from evo_hpo.search.procedure import OneFidelity, Steps
from evo_hpo.search.searcher import MANY, positive, probability
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.moves import Moves

TRIES = 50


class Genetic(OneFidelity):
    """Parents and offspring compete (mu + lambda); parents by tournament, uniform crossover, then random exchanges.

    Crossover takes each unit's level from either parent; units where the child is above the cheaper parent go back to
    it, in random order, until the budget holds, and what is left is spent on units where a parent is higher. So a child
    has only levels of its parents and is feasible by construction.

    Args:
        population: assignments kept.
        crossover: share of offspring that have two parents.
        mutation: the most random exchanges an offspring gets (1 to this many, the smaller of two uniform draws).
        tournament: assignments drawn for each parent, of which the best is taken.
        batch: offspring a generation.
        settings: ``batch``, ``tokens``, ``minibatch``, see :class:`evo_hpo.search.procedure.OneFidelity`.
    """

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        population: int = 16,
        crossover: float = 0.5,
        mutation: int = 3,
        tournament: int = 3,
        **settings: Any,
    ) -> None:
        super().__init__(space, seed=seed, **settings)
        self.population = positive("population", population, 2, MANY)
        self.crossover = probability("crossover", crossover)
        self.mutation = positive("mutation", mutation, most=MANY)
        self.tournament = positive("tournament", tournament)
        self.moves = Moves(space)

    def steps(self) -> Steps[None]:
        """Starts from uniform and exchanges of it, then breeds for ever."""
        start = self.space.uniform()
        people = [start]
        for _ in range(self.population * 4):
            if len(people) < self.population:
                mutant = self.moves.walk(start, int(self.rng.integers(1, self.mutation + 1)), self.rng)
                people += [mutant] if mutant not in people else []
        losses, _ = yield from self.measure(people)
        ranked = self._rank_people(people, losses)
        while True:
            children = self._breed(ranked)
            if not children:
                self.stop_reason = f"no assignment that is new in {TRIES} offspring"
                return
            people = [*ranked, *children]
            losses, _ = yield from self.measure(people)
            ranked = self._rank_people(people, losses)

    def _rank_people(self, people: list[Assignment], losses: list[float]) -> list[Assignment]:
        order = sorted(range(len(people)), key=lambda i: (losses[i], i))[: self.population]
        self.incumbent = people[order[0]]
        return [people[i] for i in order]

    def _breed(self, ranked: list[Assignment]) -> list[Assignment]:
        known = set(ranked) if self.minibatch == "fresh" else self._known
        children: dict[Assignment, None] = {}
        for attempt in range(TRIES * self.batch):
            if len(children) == self.batch:
                break
            child = self._select(ranked)
            crossed = self.rng.random() < self.crossover
            if crossed:
                child = self._cross(child, self._select(ranked))
            # Offspring that were seen before are thrown away; ever more exchanges make sure that new ones come.
            most = self.mutation + attempt // (2 * self.batch)
            exchanges = int(self.rng.integers(1, most + 1, size=2).min()) - int(crossed and self.rng.random() < 0.5)
            child = self.moves.walk(child, exchanges, self.rng)
            if child not in known:
                children[child] = None
        return list(children)

    def _select(self, ranked: list[Assignment]) -> Assignment:
        return ranked[int(self.rng.integers(len(ranked), size=self.tournament).min())]

    def _cross(self, one: Assignment, other: Assignment) -> Assignment:
        coins = self.rng.random(len(one)) < 0.5
        cursor = self.space.knapsack.cursor([a if coin else b for a, b, coin in zip(one, other, coins, strict=True)])
        differing = [int(i) for i in self.rng.permutation(len(one)) if one[i] != other[i]]
        for i in differing:
            if cursor.within:
                break
            cursor.step(i, min(one[i], other[i]) - cursor.levels[i])
        for i in differing:
            rise = max(one[i], other[i]) - cursor.levels[i]
            cursor.step(i, rise)
            if not cursor.within:
                cursor.step(i, -rise)
        return cursor.assignment() or one
