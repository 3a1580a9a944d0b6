"""Where EvoPress starts: uniform, fractional, random, another searcher, as its presets say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evo_hpo import Allowance, Assignment, Budget, CompressionSpace, FunctionProblem, Outcome, Unit, search
from searchers import make_searcher
from searchers.evopress.initialisation import random_and_spent, rounded_up_and_decremented
from searchers.evopress.settings import PRESETS
from tests.searchers.asking import asked
from tests.searchers.landscapes import mixed_space


def test_fractional_starts_lie_between_the_two_whole_levels() -> None:
    space = mixed_space(32)  # 2.46 bits a weight
    for seed in range(20):
        start = rounded_up_and_decremented(space, np.random.default_rng(seed))
        assert space.feasible(start)
        assert max(start) <= 1


@pytest.mark.parametrize("init", ["dynamic_programming", "trust_region"])
def test_a_start_by_another_searcher_is_charged_and_helps_on_an_additive_loss(init: str) -> None:
    rng = np.random.default_rng(0)
    units = [Unit(name=f"layers.{i}.u", costs=(2, 3, 4)) for i in range(40)]
    space = CompressionSpace(units, 120)
    weights = rng.gamma(1, 1, 40)

    def loss(levels: Assignment) -> float:
        return float(weights @ 4.0 ** -np.asarray(levels))

    found = {}
    for start in ("uniform", init):
        searcher = make_searcher("evopress", space, seed=0, init=start)
        result = search(searcher, FunctionProblem(space, loss), budget=Budget(evaluations=300))
        assert 290 <= len(result.outcomes) <= 300
        assert [o.trial.number for o in result.outcomes] == list(range(len(result.outcomes)))
        assert result.best is not None
        found[start] = loss(result.best)
    assert found[init] < found["uniform"]


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_run(preset: str) -> None:
    space = mixed_space()
    searcher = make_searcher("evopress", space, preset=preset, seed=1)
    allowance = Allowance(tokens=10**9, default_tokens=2048)
    rng = np.random.default_rng(0)
    for _ in range(12):
        trials = asked(searcher, allowance)
        searcher.tell(
            [
                Outcome(t, float(x), tokens=trials.tokens or 2048)
                for t, x in zip(trials, rng.random(len(trials)), strict=True)
            ]
        )
    assert space.feasible(searcher.recommend() or ())


@pytest.mark.parametrize("preset", ["sparsity", "quantization", "super_fast"])
def test_presets_start_from_uniform_or_the_best_of_32_rounded_up(preset: str) -> None:
    units = [Unit(f"layers.{i}.m", (2, 3, 4)) for i in range(30)]
    allowance = Allowance(tokens=10**9, default_tokens=2048)
    whole = make_searcher("evopress", CompressionSpace(units, 90), preset=preset)
    assert {t.note for t in asked(whole, allowance)} <= {"", "parent"}
    assert whole.recommend() == (1,) * 30
    between = make_searcher("evopress", CompressionSpace(units, 75), preset=preset)
    starts = asked(between, allowance)
    spare = make_searcher("evopress", CompressionSpace([Unit(u.name, (20, 30, 40)) for u in units], 909), preset=preset)
    assert {t.note for t in asked(spare, allowance)} <= {"", "parent"}
    assert spare.recommend() == (1,) * 30
    assert starts.tokens == PRESETS[preset].selection.stages[0].tokens
    assert [t.note for t in starts] == ["initial"] * 32
    assert {(set(t.levels), sum(t.levels)) == ({0, 1}, 15) for t in starts} == {True}


@pytest.mark.parametrize("settings", [{"init": "random"}, {"preset": "depth_pruning"}, {"restart_after": 2}])
def test_random_starts_spend_the_whole_budget(settings: dict[str, Any]) -> None:
    """Switches keep what an assignment costs: budget that a start leaves would be lost for the whole search."""
    space = CompressionSpace([Unit(f"layers.{i}.unit", costs=(0, 1)) for i in range(24)], 16)
    asked: list[int] = []

    def loss(levels: Assignment) -> float:
        asked.append(sum(levels))
        return float(sum((i + 1) * (1 - k) for i, k in enumerate(levels)))

    searcher = make_searcher("evopress", space, seed=3, tokens=None, **settings)
    search(searcher, FunctionProblem(space, loss), budget=Budget(evaluations=400))
    assert set(asked) == {16}


def test_two_resources_are_both_spent_by_a_random_start() -> None:
    units = [Unit(f"layers.{i}.{'am'[i % 2]}", costs=((0, 0), ((1, 0), (0, 1))[i % 2])) for i in range(20)]
    space = CompressionSpace(units, (6, 7), resources=("attention", "mlp"))
    for seed in range(5):
        assert space.costs(random_and_spent(space, np.random.default_rng(seed))) == (6, 7)
