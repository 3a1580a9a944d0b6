"""Which assignments of a landscape too large to exhaust are measured: a design, real searches, and what a fit proposes.

The last part is what makes the surrogate honest where searches go: searches run on the fit, what they find is measured,
and the next fit knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.measurements.landscapes.fitting import fit, optimise
from benchmarks.measurements.landscapes.kept_losses import Losses
from benchmarks.problems.bits import exchanged, random_design
from benchmarks.problems.surrogate import Features, Fit
from evo_hpo.search.budget import Budget
from evo_hpo.search.loop import search
from evo_hpo.search.problem import FunctionProblem, Minibatch, Problem, Score
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers import make_searcher

Measure = Callable[[Sequence[Assignment]], Sequence[Losses]]
SEARCHES = (("evopress", 300), ("local_search", 1000), ("evopress", 1500), ("simulated_annealing", 2500))
"""Searchers that run on each fit, and their evaluations."""


@dataclass
class Exploration:
    """Measures a landscape in an order that depends on the seed and on the losses alone, so that it can be resumed.

    Attributes:
        measure: losses of assignments, measured or remembered.
        seen: mean losses, in the order in which they were asked for.
        origin: what each was measured for: "design", "search" or "fit".
    """

    space: CompressionSpace
    measure: Measure
    seed: int = 0
    seen: dict[Assignment, float] = field(default_factory=dict)
    origin: dict[Assignment, str] = field(default_factory=dict)

    def run(
        self, design: int = 256, searches: int = 1, evaluations: int = 32, rounds: int = 10, each: int = 16
    ) -> None:
        """Everything.

        Args:
            design: assignments chosen before anything is known.
            searches: searches on the model itself, of ``evaluations`` each.
            rounds: fits, each followed by searches on it and by ``each`` measurements of what they found.
        """
        self.take(random_design(self.space, self.seed, design), "design")
        for number in range(searches):
            self._search(number, evaluations)
        settings = None
        for number in range(rounds):
            features = Features.of(self.space)
            levels, losses = np.array(list(self.seen)), np.array(list(self.seen.values()))
            if number % 3 == 0:
                settings = optimise(features, levels, losses, settings, steps=25)
            assert settings is not None
            self.take(self._proposals(fit(features, levels, losses, settings), number, each), "fit")

    def take(self, assignments: Sequence[Assignment], origin: str) -> list[float]:
        """Mean losses of assignments; new ones are noted."""
        means = [float(np.mean(losses)) for losses in self.measure(assignments)]
        for assignment, mean in zip(assignments, means, strict=True):
            self.seen.setdefault(assignment, mean)
            self.origin.setdefault(assignment, origin)
        return means

    def _search(self, number: int, evaluations: int) -> None:
        searcher = make_searcher("evopress", self.space, seed=number, offspring=8)
        search(searcher, _Measured(self), budget=Budget(evaluations=evaluations), seed=number)

    def _proposals(self, fitted: Fit, number: int, each: int) -> list[Assignment]:
        """Improvements on the way of searches on the fit, the last ones first, and exchanges away from the best."""
        rng = np.random.default_rng([self.seed, 11, number])
        flat = np.ones(len(self.space))
        found: dict[Assignment, None] = {}
        problem = FunctionProblem(self.space, fitted)
        for name, evaluations in SEARCHES:
            searcher = make_searcher(name, self.space, seed=1000 * self.seed + number)
            result = search(searcher, problem, budget=Budget(evaluations=evaluations), seed=number)
            path, best = [], float("inf")
            for outcome in result.outcomes:
                if outcome.loss < best:
                    best = outcome.loss
                    path.append(outcome.trial.levels)
            share = each // len(SEARCHES)
            chosen = [path[-1 - round(i)] for i in np.linspace(0, len(path) - 1, max(share - 2, 1))]
            near = [
                exchanged(self.space, path[-1], int(rng.integers(2, 16)), rng, flat, flat) for _ in range(min(share, 2))
            ]
            found.update(dict.fromkeys(chosen + near))
        return [a for a in found if a not in self.seen]


class _Measured(Problem):
    """The landscape itself as a problem."""

    name = "measured"

    def __init__(self, exploration: Exploration) -> None:
        self.space = exploration.space
        self._exploration = exploration

    def score(
        self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None
    ) -> Sequence[Score]:
        return [Score(loss) for loss in self._exploration.take(assignments, "search")]
