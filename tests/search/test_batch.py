"""A batch: what it holds, what it refuses, how it is cut, and which data the loop draws for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from evo_hpo import (
    Allowance,
    Batch,
    Budget,
    CompressionSpace,
    FunctionProblem,
    Outcome,
    Searcher,
    Terms,
    Trial,
    Unit,
    search,
)
from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.conformance import TokenProblem, loss
from evo_hpo.search.problem import Minibatch, Score
from evo_hpo.space.compression_space import Assignment

SPACE = CompressionSpace([Unit(f"layers.{i}", (2, 3, 4)) for i in range(6)], 18)
TRIALS = tuple(Trial(i, SPACE.uniform()) for i in range(5))


def test_a_batch_is_its_trials_in_order_and_is_cut_from_the_end() -> None:
    batch = Batch(TRIALS, Terms(tokens=64, stage=1))
    assert (list(batch), len(batch), batch.tokens) == (list(TRIALS), 5, 64)
    assert batch.first(2) == Batch(TRIALS[:2], batch.terms)
    assert batch.first(5) is batch.first(9) is batch


@pytest.mark.parametrize(("trials", "message"), [((), "ask returns None"), ((SPACE.uniform(),), "made by self.trial")])
def test_a_batch_holds_trials_and_at_least_one(trials: Any, message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        Batch(trials)


class Script(Searcher):
    """Asks for batches of two on the terms it is given, then ends."""

    def __init__(self, *terms: Terms) -> None:
        super().__init__(SPACE, seed=0)
        self.terms = list(terms)
        self.told: list[Outcome] = []

    def ask(self, allowance: Allowance) -> Batch | None:
        return (
            Batch((self.trial(SPACE.uniform()), self.trial(SPACE.uniform())), self.terms.pop(0)) if self.terms else None
        )

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        self.told += outcomes


class Watched(TokenProblem):
    """Keeps what it was asked to score."""

    def __init__(self) -> None:
        super().__init__(SPACE)
        self.seen: list[tuple[Minibatch, int | None]] = []

    def score(
        self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None
    ) -> Sequence[Score]:
        self.seen.append((minibatch, keep))
        return super().score(assignments, minibatch, keep=keep)


def test_fixed_fresh_and_same_name_the_minibatch_and_outcomes_carry_the_terms() -> None:
    rules: Any = ("fixed", "fresh", "same", "fresh", "fixed")
    terms = [
        Terms(tokens=t, draw=d, keep=k)
        for t, d, k in zip((None, 8, 16, 8, 4), rules, (None, 1, 1, 2, None), strict=True)
    ]
    problem, searcher = Watched(), Script(*terms)
    result = search(searcher, problem, budget=Budget(evaluations=100), seed=5)
    assert [keep for _, keep in problem.seen] == [None, 1, 1, 2, None]
    assert [m.tokens for m, _ in problem.seen] == [64, 8, 16, 8, 4]
    fixed, fresh, same, other, again = (m.seed for m, _ in problem.seen)
    assert fixed == again
    assert fresh == same
    assert len({fixed, fresh, other}) == 3
    assert [o.terms for o in result.outcomes] == [t for t in terms for _ in range(2)]
    assert searcher.told == result.outcomes
    assert result.stop_reason == "the searcher has nothing more to ask"


def test_losses_by_sequence_are_told_where_they_were_asked_for_and_the_problem_has_them() -> None:
    terms = (Terms(tokens=64), Terms(tokens=64, by_sequence=True), Terms(tokens=16, by_sequence=True))
    told = search(Script(*terms), Watched(), budget=Budget(evaluations=100)).outcomes
    assert [None if o.by_sequence is None else len(o.by_sequence) for o in told] == [None, None, 4, 4, 1, 1]
    for outcome in told[2:]:
        assert outcome.by_sequence is not None
        assert math.fsum(outcome.by_sequence) / len(outcome.by_sequence) == outcome.loss
    without = search(Script(*terms), FunctionProblem(SPACE, loss), budget=Budget(evaluations=100)).outcomes
    assert [o.by_sequence for o in without] == [None] * 6
    assert all(o.usable for o in without)


def test_a_trial_that_was_stopped_or_failed_has_no_losses_by_sequence() -> None:
    class Partial(TokenProblem):
        def score(
            self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None
        ) -> Sequence[Score]:
            stopped = Score(1.0, 32, stopped=True, by_sequence=(1.0, 1.0))
            return [stopped, Score(math.nan, 64, reason="chosen", by_sequence=(math.nan, 1.0))]

    told = search(Script(Terms(by_sequence=True)), Partial(SPACE), budget=Budget(evaluations=2)).outcomes
    assert [(o.status, o.by_sequence) for o in told] == [("stopped", None), ("failed", None)]


def test_a_batch_that_is_paid_in_part_keeps_its_terms() -> None:
    problem, searcher = Watched(), Script(Terms(tokens=10, draw="fresh", generation=3))
    result = search(searcher, problem, budget=Budget(tokens=19))
    assert [(o.trial.number, o.tokens, o.terms.generation) for o in result.outcomes] == [(0, 10, 3)]
