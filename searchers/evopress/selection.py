"""How EvoPress chooses survivors: stages of growing fidelity (arXiv 2410.14649, section 3.3)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.budget import Allowance
from evo_hpo.search.searcher import one_of, positive
from evo_hpo.search.trial import Outcome


@dataclass(frozen=True)
class Stage:
    """Scores every candidate on ``tokens`` calibration tokens (None: the problem's default) and keeps ``survivors``."""

    survivors: int
    tokens: int | None = None


@dataclass(frozen=True)
class Selection:
    """A list of stages; the last one's survivors are the next parents.

    ``elitism`` says where the parents join: ``index``: in the last stage (as the paper describes); ``count``: in every
    stage that keeps as few as the last (as the reference implementation behaves); ``none``: nowhere.
    """

    stages: tuple[Stage, ...]
    elitism: str = "index"

    @classmethod
    def of(cls, survivors: Sequence[int], tokens: Sequence[int] | int | None, elitism: str) -> Selection:
        """Stages from a list of survivors and a list of tokens (or one for all, or None).

        Raises:
            InvalidSettingError: lists of different length, survivors that grow, or tokens that shrink.
        """
        if not isinstance(survivors, Sequence) or not survivors:
            raise InvalidSettingError(f"survivors={survivors!r} must be a list with one entry a stage, as [4, 1]")
        survivors = [positive("survivors", s) for s in survivors]
        if survivors != sorted(survivors, reverse=True):
            raise InvalidSettingError(f"survivors={survivors} must be a falling list of integers of at least 1")
        each: Sequence[int | None] = tokens if isinstance(tokens, Sequence) else [tokens] * len(survivors)
        if len(each) != len(survivors):
            raise InvalidSettingError(f"tokens={each} must have one entry for each of the {len(survivors)} survivors")
        given = [positive("tokens", t) for t in each if t is not None]
        if given != sorted(given) or len(given) not in (0, len(each)):
            raise InvalidSettingError(f"tokens={each} must be a rising list of positive integers")
        one_of("elitism", elitism, "index", "count", "none")
        return cls(tuple(Stage(s, t) for s, t in zip(survivors, each, strict=True)), elitism)

    def in_one_stage(self) -> Selection:
        """The last stage alone: where losses are exact, the stages before it cannot change who survives."""
        return Selection(self.stages[-1:], self.elitism)

    @property
    def population(self) -> int:
        """Parents of a generation."""
        return self.stages[-1].survivors

    def joins(self, stage: int) -> bool:
        """True where the parents join this stage."""
        if self.elitism == "count":
            return self.stages[stage].survivors == self.population
        return self.elitism == "index" and stage == len(self.stages) - 1

    def needed(self, candidates: int, stage: int) -> bool:
        """False where a stage has no choice to make: it is not the last one, and keeps all that it gets."""
        return stage == len(self.stages) - 1 or candidates > self.stages[stage].survivors

    def affordable(self, offspring: int, parents: int, allowance: Allowance) -> int:
        """The most offspring, up to ``offspring``, whose whole generation the allowance pays; 0: none."""

        def unpaid(count: int) -> bool:
            trials, tokens = self.price(count, parents, allowance.default_tokens)
            return (allowance.evaluations is not None and trials > allowance.evaluations) or (
                allowance.tokens is not None and tokens > allowance.tokens
            )

        most = min(offspring, 2**62)  # as long as a range may be
        return bisect.bisect_left(range(1, most + 1), True, key=unpaid)  # more offspring never cost less

    def price(self, offspring: int, parents: int, default_tokens: int) -> tuple[int, int]:
        """Trials and tokens of a whole generation; ``parents`` are those that have to be scored beside it."""
        candidates, trials, tokens = offspring, 0, 0
        for j, stage in enumerate(self.stages):
            if not self.needed(candidates, j):
                continue
            scored = candidates + (parents if self.joins(j) else 0)
            trials, tokens = trials + scored, tokens + scored * (stage.tokens or default_tokens)
            candidates = min(candidates, stage.survivors)
        return trials, tokens


_ORDER = {"complete": 0, "stopped": 1, "failed": 2}


def rank(outcome: Outcome) -> tuple[int, float]:
    """Sorts best first: complete before stopped before failed, then by loss."""
    return _ORDER[outcome.status], outcome.loss
