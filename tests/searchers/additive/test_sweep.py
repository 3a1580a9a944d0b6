"""One pass of dynamic programming over all budgets, against brute force and against the solver of one budget."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.problems.synthetic import synthetic_space
from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit
from evo_hpo.space.ranges import at, spanning
from searchers.additive import sweep as module
from searchers.additive.solvers import solve_by_dynamic_programming
from searchers.additive.sweep import sweep


def total(effects: list[list[float]], levels: Assignment) -> float:
    return sum(effects[u][k] for u, k in enumerate(levels))


def brute(space: CompressionSpace, effects: list[list[float]]) -> list[tuple[int, float]]:
    """Cost and loss of everything that loses less than all that costs no more."""
    found: list[tuple[int, float]] = []
    for cost, loss in sorted((space.cost(a), total(effects, a)) for a in space.enumerate()):
        if not found or loss < found[-1][1]:
            found.append((cost, loss))
    return found


def random_effects(space: CompressionSpace, seed: int) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 1000, len(unit.costs)).astype(float).tolist() for unit in space.units]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("unequal", [False, True])
def test_finds_the_whole_front_that_brute_force_finds(seed: int, unequal: bool) -> None:
    space = synthetic_space(7, 4, 0.1, unequal, tightest=0.9)
    effects = random_effects(space, seed)
    found = [(space.cost(a), total(effects, a)) for a in sweep(space, effects)]
    assert found == brute(space, effects)


def test_each_of_its_points_is_the_solution_of_that_budget_alone() -> None:
    space = synthetic_space(30, 5, 0.2, True, tightest=0.8)
    effects = random_effects(space, 1)
    front = sweep(space, effects)
    assert len(front) > 50
    for levels in front[:: len(front) // 7]:
        alone = solve_by_dynamic_programming(at(space, space.cost(levels)), effects)
        assert alone is not None
        assert math.isclose(total(effects, levels), total(effects, alone))


def test_forbidden_levels_and_fixed_units_are_kept_to() -> None:
    units = [Unit(f"m{i}", (1, 2, 4), fixed=1 if i == 2 else None) for i in range(6)]
    space = spanning(CompressionSpace(units, 9), CompressionSpace(units, 20))
    effects = random_effects(space, 3)
    effects[0][1] = math.inf
    found = [(space.cost(a), total(effects, a)) for a in sweep(space, effects)]
    assert found == [p for p in brute(space, effects) if math.isfinite(p[1])]


def test_costs_too_fine_for_the_table_are_rounded_up_and_stay_within_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    units = [Unit(f"m{i}", (1000 + i, 2000 + 7 * i, 3000 + 11 * i)) for i in range(8)]
    space = spanning(CompressionSpace(units, 10_000), CompressionSpace(units, 20_000))
    effects = [[3.0 * (i + 1), 1.0 * (i + 1), 0.0] for i in range(8)]
    exact = sweep(space, effects)
    monkeypatch.setattr(module, "MOST_CELLS", 8 * 400)
    rough = sweep(space, effects)
    assert all(space.feasible(a) for a in rough)
    assert total(effects, rough[-1]) <= 1.2 * total(effects, exact[-1]) + 1
    assert len(rough) > 5


def test_with_two_resources_it_solves_at_the_marks() -> None:
    units = [Unit(f"m{i}", ((1, 0), (2, 1), (5, 1))) for i in range(6)]
    space = CompressionSpace(units, (20, 4), floor=(8, 0), ranged=True)
    effects = random_effects(space, 2)
    front = sweep(space, effects)
    everything = dict(brute(space, effects))
    assert front
    for levels in front:
        assert space.feasible(levels)
        least = min(loss for cost, loss in everything.items() if cost <= space.cost(levels))
        assert math.isclose(total(effects, levels), least)
