"""A problem whose scorers are elsewhere, here by a stand-in for them."""

from __future__ import annotations

from typing import Any

from evo_hpo.run.spread_problem import SpreadProblem
from evo_hpo.search.registry import make_problem


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
