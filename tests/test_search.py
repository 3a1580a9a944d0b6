"""The loop: what it refuses, and what it says about evaluations that fail."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from evo_hpo import Budget, CompressionSpace, FunctionProblem, Unit, search
from evo_hpo.errors import BudgetError, InvalidSettingError
from evo_hpo.registry import make_searcher
from evo_hpo.searcher import Searcher
from evo_hpo.space import Assignment


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
