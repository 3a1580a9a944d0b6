"""A problem whose scorers are elsewhere, here by a stand-in for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

from evo_hpo import Budget, CompressionSpace, search
from evo_hpo.run.spread_problem import SpreadProblem
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.language_model_problem import LanguageModelProblem
from evo_hpo.scoring.replica import Replica
from evo_hpo.search.registry import make_problem
from searchers import make_searcher
from tests.tiny import RoundedLevels, tiny_model, tiny_tokens


def test_the_known_front_of_a_problem_comes_along() -> None:
    settings = {"units": 12, "unequal": True, "interaction": 0.0, "tightness": 0.2, "tightest": 0.9, "seed": 0}
    problem = make_problem("noisy", **settings)

    class Here:
        def __len__(self) -> int:
            return 1

        def ask(self, name: str, settings: dict[str, Any], questions: Any) -> list[list[Any]]:
            def answer(key: str, given: Any, more: Any) -> Any:
                found = getattr(problem, key)
                return found(*given, **more) if callable(found) else found

            return [[answer(*call) for call in calls] for calls in questions]

    assert problem.optima
    assert SpreadProblem(Here(), "noisy", settings).optima == problem.optima


class Answering:
    """Several scorers of one language model, that are asked in turn."""

    def __init__(self, problems: list[LanguageModelProblem]) -> None:
        self.problems, self.next = problems, 0

    def __len__(self) -> int:
        return len(self.problems)

    def ask(self, name: str, settings: dict[str, Any], questions: Any) -> list[list[Any]]:
        return [self.answer(calls) for calls in questions]

    def answer(self, calls: Any) -> list[Any]:
        self.next += 1
        problem = self.problems[self.next % len(self.problems)]
        told = []
        for key, given, more in calls:
            found = getattr(problem, key)
            told.append(found(*given, **more) if callable(found) else found)
        return told


class _Broken(RoundedLevels):
    """Level 0 of one layer is not a number."""

    def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
        found = super().weights(unit, level)
        return {n: w * math.nan for n, w in found.items() if w is not None} if (unit, level) == (6, 0) else found


def test_each_search_reports_what_it_had_read_wherever_that_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    levels = _Broken(model)
    space, run = CompressionSpace.from_average(levels.units, 4.0), Replica.run

    def made() -> LanguageModelProblem:
        evaluator = Evaluator(model, levels, tiny_tokens(length=12), threads=1, batch_size=2)
        return LanguageModelProblem(evaluator, space, tiny_tokens(2, 12, seed=4), tokens=36, name="tiny")

    def greedy(self: Replica, *arguments: Any) -> Any:
        if len(arguments[2]) > 1:
            raise MemoryError
        return run(self, *arguments)

    monkeypatch.setattr(Replica, "run", greedy)
    for problem, scorers in ((made(), 1), (SpreadProblem(Answering([made(), made()]), "tiny", {}), 2)):
        shortages = scorers  # each halves its passes once
        for searcher in ("random", "uniform", "uniform"):
            result = search(make_searcher(searcher, space, seed=0), problem, budget=Budget(evaluations=6), seed=1)
            told, failed = result.scoring, sum(o.status == "failed" for o in result.outcomes)
            new = len({o.trial.levels for o in result.outcomes}) if searcher == "random" else 0
            if searcher == "uniform":
                assert failed == 0
                assert told["candidates"] + told["cached"] == len(result.outcomes)
            else:
                assert failed > 0
                assert (told["candidates"], told["cached"]) == (new, 0)
                assert told["tokens"] == new * 36
            assert told["non_finite"] == failed
            assert told["out_of_memory"] == shortages
            shortages = 0
