"""The loop: what it refuses, and what it says about evaluations that fail."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest

from evo_hpo import Budget, CompressionSpace, FunctionProblem, Unit, search
from evo_hpo.errors import BudgetError, InvalidSettingError
from evo_hpo.search.problem import Minibatch, Problem, Score
from evo_hpo.search.registry import make_searcher
from evo_hpo.search.searcher import Searcher
from evo_hpo.space.compression_space import Assignment


def levels_space() -> CompressionSpace:
    return CompressionSpace([Unit(f"layers.{i}", (2, 3, 4)) for i in range(8)], 24)


def test_a_loss_that_always_fails_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def broken(levels: Assignment) -> float:
        return levels[0] / 0

    space = levels_space()
    with caplog.at_level(logging.WARNING):
        result = search(
            make_searcher("evopress", space, offspring=4), FunctionProblem(space, broken), budget=Budget(evaluations=20)
        )
    assert result.best is None
    assert caplog.messages == ["trial 0 failed (later failures are only counted): ZeroDivisionError: division by zero"]
    assert len(repr(result)) < 500


def test_a_budget_is_a_budget() -> None:
    space = levels_space()
    wrong: Any = 300
    with pytest.raises(BudgetError, match=r"Budget\(evaluations=300\)"):
        search(make_searcher("uniform", space), FunctionProblem(space, sum), budget=wrong)


def test_what_is_asked_are_trials() -> None:
    class Tuples(Searcher):
        def ask(self, _: Any) -> Any:
            return [self.space.uniform()]

        def tell(self, _: Any) -> None: ...

    space = levels_space()
    with pytest.raises(InvalidSettingError, match="made by self.trial"):
        search(Tuples(space, seed=0), FunctionProblem(space, sum), budget=Budget(evaluations=2))


class FailsUnread(Problem):
    """Fails before it reads anything, and says of no trial what it read."""

    name, tokens = "fails", 64

    def __init__(self) -> None:
        self.space = levels_space()

    def score(self, assignments: Sequence[Assignment], minibatch: Minibatch, keep: int | None = None) -> list[Score]:
        return [Score(math.nan, reason="does not load")] * len(assignments)


def test_trials_that_name_no_tokens_are_charged_whole_so_that_every_search_ends() -> None:
    problem = FailsUnread()
    result = search(make_searcher("random", problem.space, seed=0), problem, budget=Budget(tokens=640))
    assert [o.tokens for o in result.outcomes] == [64] * 10


@pytest.mark.parametrize("fraction", [1.5, 0, -1])
def test_a_checkpoint_that_is_no_fraction_of_the_budget_is_refused(fraction: float) -> None:
    space = levels_space()
    with pytest.raises(BudgetError, match="fraction of the budget"):
        search(
            make_searcher("random", space),
            FunctionProblem(space, float),  # type: ignore[arg-type]
            budget=Budget(evaluations=3),
            checkpoints=[fraction],
        )
