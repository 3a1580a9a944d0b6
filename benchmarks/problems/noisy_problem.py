"""A synthetic landscape that is read in minibatches: a loss depends on the data, less so with more tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.problems.closed_form import SEQUENCE, closed_form
from benchmarks.problems.pairwise import Landscape
from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.problem import Minibatch, Problem, Score
from evo_hpo.search.sensitivities import Form, Kind, Sensitivities
from evo_hpo.space.compression_space import Assignment, CompressionSpace

MOST_DRAWS = 10_000_000
"""Factors of a minibatch: sequences times units."""


class NoisyProblem(Problem):
    """A landscape whose sensitivities differ from minibatch to minibatch, less so with more tokens.

    Every 64 tokens of a minibatch draw their own log-normal-like factor for each unit; a minibatch has their mean. So
    trials of one batch share their noise, and the same seed with more tokens holds the same draws (nested).

    Args:
        space: its space.
        landscape: the loss without noise; held-out figures are exact.
        noise: standard deviation of a unit's factor on 1024 tokens.
        tokens: default fidelity.
        sensitivities: how good they are, see :data:`benchmarks.problems.closed_form.Quality`.
        delay: seconds that scoring an assignment takes, to try schedules with.
    """

    has_sensitivities = True

    def __init__(
        self,
        space: CompressionSpace,
        landscape: Landscape,
        *,
        noise: float,
        tokens: int = 1024,
        optimum: float | None = None,
        sensitivities: str = "noisy",
        delay: float = 0.0,
    ) -> None:
        self.name = "noisy"
        self.delay = delay
        self.space = space
        self.landscape = landscape
        self.noise = noise
        self.tokens = tokens
        self.pool_tokens = MOST_DRAWS // len(space) * SEQUENCE
        self.optimum = optimum
        self.quality = sensitivities

    @cached_property
    def _factors(self) -> dict[Minibatch, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Of the last minibatch: each unit's factor, and how far it is from that in each sequence."""
        return {}

    def score(
        self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None
    ) -> Sequence[Score]:
        if minibatch not in self._factors:
            self._factors.clear()
            draws = self._draws(minibatch)
            mean = draws.mean(axis=0)
            self._factors[minibatch] = np.maximum(mean + 1.0, 0.0), draws - mean
        factors, apart = self._factors[minibatch]
        time.sleep(self.delay * len(assignments))
        return [self._score(a, factors, apart, minibatch.tokens) for a in assignments]

    def _score(
        self, levels: Assignment, factors: np.ndarray[Any, Any], apart: np.ndarray[Any, Any], tokens: int
    ) -> Score:
        loss = self.landscape(levels, factors)
        return Score(loss, tokens, by_sequence=tuple((loss + self.landscape.apart(levels, apart)).tolist()))

    def _draws(self, minibatch: Minibatch) -> np.ndarray[Any, Any]:
        """How far each unit's factor is from 1 in each sequence (sequences x units)."""
        self.check(minibatch.tokens)
        shape = (max(1, minibatch.tokens // SEQUENCE), len(self.space))
        return np.random.default_rng([minibatch.seed, 5 + 90 * minibatch.generated]).normal(
            0.0, 4.0 * self.noise, shape
        )

    def sensitivities(
        self, assignment: Assignment | None, minibatch: Minibatch, *, kind: Kind = "sampled", form: Form = "inner"
    ) -> Sensitivities:
        """In closed form; layer-wise errors are those of the levels, which know nothing of the sensitivities."""
        if kind == "layerwise":
            return Sensitivities(kind, assignment, self.landscape.errors[None].astype(np.float32), 1, 0)
        scape, factors = self.landscape, 1.0 + self._draws(minibatch)
        return closed_form(scape.roots, scape.curvature(), factors, assignment, minibatch, kind, form, self.quality)

    def check(self, tokens: int) -> None:
        """Raises InvalidSettingError when a minibatch of so many tokens would not fit into memory."""
        if tokens > self.pool_tokens:
            raise InvalidSettingError(
                f"a minibatch of {tokens} tokens: at most {self.pool_tokens} with {len(self.space)} units"
            )

    def validate(self, assignment: Assignment) -> dict[str, float]:
        return {"loss": self.landscape(assignment)}
