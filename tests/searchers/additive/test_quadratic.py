"""The quadratic knapsack against a listing of all assignments."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.problems.synthetic import additive, synthetic_space
from evo_hpo import CompressionSpace, Unit
from searchers.additive.quadratic import Quadratic, minimise
from searchers.additive.solvers import solve


def _model(space: CompressionSpace, seed: int, rank: int = 5, signs: bool = False) -> Quadratic:
    rng = np.random.default_rng(seed)
    depth = max(len(u.costs) for u in space.units)
    fall = 0.5 ** np.arange(depth)
    weights = rng.choice([-1.0, 1.0], rank) if signs else np.ones(rank)
    factors = rng.normal(size=(rank, len(space), 1)) * fall * 0.6
    return Quadratic(rng.gamma(1, 1, (len(space), 1)) * fall**2, factors, weights)


def _spaces() -> dict[str, CompressionSpace]:
    two = [Unit(f"layers.{i}.m", ((1, 0), (2, 1), (5, 1))) for i in range(8)]
    return {
        "equal": synthetic_space(9, 3),
        "unequal": synthetic_space(9, 3, unequal=True),
        "exact": synthetic_space(14, 2, tightness=0.5, exact=True),
        "two resources": CompressionSpace(two, (20, 5), resources=("bits", "kept")),
    }


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("name", _spaces())
def test_local_search_finds_the_best_of_all_assignments(name: str, signs: bool) -> None:
    space = _spaces()[name]
    everything = list(space.enumerate())
    for seed in range(4):
        model = _model(space, seed, signs=signs)
        found = minimise(space, model, space.uniform(), np.random.default_rng(0))
        assert space.feasible(found)
        assert model(found) == pytest.approx(min(map(model, everything)), abs=1e-9)


def test_within_so_many_changed_units_too() -> None:
    space = _spaces()["equal"]
    centre = space.uniform()
    near = [a for a in space.enumerate() if sum(x != y for x, y in zip(a, centre, strict=True)) <= 3]
    for seed in range(4):
        model = _model(space, seed)
        found = minimise(space, model, centre, np.random.default_rng(0), changes=3)
        assert found in near
        assert model(found) == pytest.approx(min(map(model, near)), abs=1e-9)


def test_levels_without_an_effect_are_never_taken() -> None:
    space = _spaces()["equal"]
    model = _model(space, 0)
    effects = model.effects.copy()
    effects[:4, 0] = np.inf
    model = Quadratic(effects, model.factors, model.weights)
    found = minimise(space, model, (1,) * 5 + (0,) * 4, np.random.default_rng(0))
    assert min(found[:4]) > 0


def test_moves_are_the_differences_of_the_loss() -> None:
    space = _spaces()["unequal"]
    model, at = _model(space, 1, signs=True), space.uniform()
    alone, _ = model.moves(at)
    for unit in range(len(space)):
        for level in range(3):
            moved = (*at[:unit], level, *at[unit + 1 :])
            assert alone[unit, level] == pytest.approx(model(moved) - model(at))


def test_without_cross_terms_it_is_the_exact_knapsack() -> None:
    problem = additive(units=40, levels=5, unequal=True, seed=1)
    effects = np.array(problem.function.effects())  # type: ignore[attr-defined]
    model = Quadratic(effects, np.zeros((1, 40, 5)), np.ones(1))
    found = minimise(problem.space, model, problem.space.uniform(), np.random.default_rng(0), kicks=0)
    best = solve(problem.space, effects.tolist())
    assert best is not None
    assert model(found) == pytest.approx(model(best))
