"""The additive model and its exact solvers, against brute force and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evo_hpo.errors import InvalidSpaceError
from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit
from searchers.additive.model import AdditiveModel
from searchers.additive.solvers import (
    solve,
    solve_by_dynamic_programming,
    solve_by_integer_programming,
    solve_many,
)
from searchers.moves import Moves
from tests.spaces import all_feasible, spaces


def total(effects: list[list[float]], levels: Assignment) -> float:
    return sum(e[k] for e, k in zip(effects, levels, strict=True))


def draw_effects(space: CompressionSpace, seed: int) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=len(u.costs)).tolist() for u in space.units]


@settings(max_examples=80)
@given(spaces(resources=1), st.integers(0, 10**6), st.none() | st.integers(0, 4))
def test_dynamic_programming_is_exact(space: CompressionSpace, seed: int, changes: int | None) -> None:
    feasible = all_feasible(space)
    start = feasible[seed % len(feasible)]
    effects = draw_effects(space, seed)
    within = [a for a in feasible if changes is None or sum(x != y for x, y in zip(a, start, strict=True)) <= changes]
    found = solve_by_dynamic_programming(space, effects, start=start, changes=changes)
    assert found is not None
    assert found in within
    assert total(effects, found) == pytest.approx(min(total(effects, a) for a in within))


@settings(max_examples=40)
@given(spaces(), st.integers(0, 10**6), st.none() | st.integers(0, 4))
def test_integer_programming_is_exact_with_one_and_with_two_resources(
    space: CompressionSpace, seed: int, changes: int | None
) -> None:
    feasible = all_feasible(space)
    start = feasible[seed % len(feasible)]
    effects = draw_effects(space, seed)
    within = [a for a in feasible if changes is None or sum(x != y for x, y in zip(a, start, strict=True)) <= changes]
    found = solve_by_integer_programming(space, effects, start=start, changes=changes)
    assert found is not None
    assert found in within
    assert total(effects, found) == pytest.approx(min(total(effects, a) for a in within))


@pytest.mark.parametrize("changes", [None, 3, 12])
def test_both_solvers_agree_on_a_model_of_real_size(changes: int | None) -> None:
    """210 units of a decoder with grouped-query attention, 5 levels, average 3."""
    sizes = (3, 1, 1, 3, 8, 8, 8)
    units = [Unit(f"m{i}", tuple(sizes[i % 7] * b for b in (2, 3, 4, 5, 6)), size=sizes[i % 7]) for i in range(210)]
    space = CompressionSpace.from_average(units, 3)
    rng = np.random.default_rng(0)
    effects = [(u.size * rng.gamma(1.0) * 4.0 ** -np.arange(5)).tolist() for u in units]
    start = space.uniform()
    one = solve_by_dynamic_programming(space, effects, start=start, changes=changes)
    other = solve_by_integer_programming(space, effects, start=start, changes=changes)
    assert one is not None
    assert other is not None
    assert total(effects, one) == pytest.approx(total(effects, other), rel=1e-6)


def test_solving_many_at_once_is_solving_each() -> None:
    space = CompressionSpace([Unit(f"m{i}", (1, 2, 4)) for i in range(6)], 12)
    batch = [draw_effects(space, s) for s in range(5)]
    start = space.uniform()
    assert solve_many(space, batch, start=start, changes=3) == [solve(space, e, start=start, changes=3) for e in batch]


def test_costs_too_fine_for_a_table_are_solved_from_prices() -> None:
    rng = np.random.default_rng(1)
    units = [Unit(f"m{i}", tuple(int(c) for c in np.cumsum(rng.integers(10**5, 10**6, 3)))) for i in range(12)]
    space = CompressionSpace(units, sum(u.costs[1] for u in units))  # type: ignore[misc]
    effects = [[-float(k) * (i + 1) for k in range(3)] for i in range(12)]
    found = solve(space, effects)
    assert found is not None
    assert total(effects, found) == pytest.approx(min(total(effects, a) for a in space.enumerate()))


def test_units_of_hundreds_of_levels_are_solved() -> None:
    space = CompressionSpace([Unit(f"m{i}", tuple(range(300))) for i in range(3)], 500)
    effects = [
        [(k - 280.0) ** 2 for k in range(300)],
        [(k - 200.0) ** 2 for k in range(300)],
        [float(k) for k in range(300)],
    ]
    assert solve_by_dynamic_programming(space, effects) == (280, 200, 0)


def test_forbidden_levels_are_not_used() -> None:
    space = CompressionSpace([Unit(f"m{i}", (1, 2, 3)) for i in range(4)], 12)
    effects = [[0.0, math.inf, -1.0], [math.inf, 0.0, math.inf], [0.0, -1.0, -2.0], [0.0, -1.0, -2.0]]
    for solver in (solve_by_dynamic_programming, solve_by_integer_programming):
        assert solver(space, effects) == (2, 1, 2, 2)
    impossible = [[math.inf, math.inf, 0.0] for _ in range(4)]
    tight = CompressionSpace(space.units, 8)
    assert solve_by_dynamic_programming(tight, impossible) is None
    assert solve_by_integer_programming(tight, impossible) is None


def test_the_model_recovers_additive_effects_from_enough_feasible_rows() -> None:
    """Differences between feasible assignments identify every step's effect, where slack varies."""
    space = CompressionSpace([Unit(f"layers.{i}.m", (2, 3, 4)) for i in range(6)], 18)
    effects = draw_effects(space, 3)
    start = space.uniform()
    rng = np.random.default_rng(0)
    model = AdditiveModel(space, outlier=1e9)
    for _ in range(120):
        levels = space.sample(rng)
        model.add(levels, start, total(effects, levels) - total(effects, start))
    model.fit(start)
    fitted = model.effects()
    for unit, truth in zip(fitted, effects, strict=True):
        assert np.diff(unit) == pytest.approx(np.diff(truth), abs=1e-3)


def test_with_fewer_rows_than_effects_the_model_still_predicts_better_than_nothing() -> None:
    """Roles that share a scale are recognised: 30 rows for 120 effects."""
    space = CompressionSpace([Unit(f"layers.{i // 4}.r{i % 4}", (2, 3, 4)) for i in range(60)], 180)
    rng = np.random.default_rng(4)
    effects = [[0.0, -(4.0 ** (i % 4)), -1.25 * 4.0 ** (i % 4)] for i in range(60)]
    moves, start = Moves(space), space.uniform()
    model = AdditiveModel(space)
    for _ in range(30):
        levels = moves.walk(start, 2, rng)
        model.add(levels, start, total(effects, levels) - total(effects, start))
    model.fit(start)
    fitted = model.effects()
    tests = [moves.walk(start, 4, rng) for _ in range(200)]
    truth = [total(effects, a) - total(effects, start) for a in tests]
    guess = [total(fitted, a) - total(fitted, start) for a in tests]
    assert np.corrcoef(truth, guess)[0, 1] > 0.8


def test_posterior_draws_scatter_around_the_mean_and_less_with_more_rows() -> None:
    space = CompressionSpace([Unit(f"layers.{i}.m", (2, 3, 4)) for i in range(8)], 24)
    effects, start = draw_effects(space, 5), space.uniform()
    rng = np.random.default_rng(0)
    model = AdditiveModel(space)
    spreads = []
    for rows in (5, 60):
        while len(model) < rows:
            levels = space.sample(rng)
            model.add(levels, start, total(effects, levels) - total(effects, start))
        model.fit(start)
        draws = np.array([np.concatenate([np.diff(u) for u in model.effects(rng)]) for _ in range(200)])
        mean = np.concatenate([np.diff(u) for u in model.effects()])
        assert np.abs(draws.mean(axis=0) - mean).max() < 5 * draws.std(axis=0).max() / math.sqrt(200) + 1e-6
        spreads.append(draws.std(axis=0).mean())
    assert spreads[1] < 0.2 * spreads[0]


def test_failed_rows_are_ignored() -> None:
    space = CompressionSpace([Unit(f"m{i}", (2, 3)) for i in range(3)], 8)
    model = AdditiveModel(space)
    for difference in (math.inf, math.nan, -math.inf):
        model.add((0, 0, 1), space.uniform(), difference)
    model.add(space.uniform(), space.uniform(), 1.0)
    assert len(model) == 0


@settings(max_examples=60)
@given(spaces(), st.sampled_from(["none", "size", "name"]))
def test_neighbours_are_all_feasible_single_steps_and_pairs(space: CompressionSpace, rule: str) -> None:
    levels = all_feasible(space)[0]
    groups = list(space.groups(rule).values())
    expected = set()
    for other in all_feasible(space):
        moved = [(i, b - a) for i, (a, b) in enumerate(zip(levels, other, strict=True)) if a != b]
        steps = sorted(step for _, step in moved)
        if steps in ([-1], [1]) or (steps == [-1, 1] and any({i for i, _ in moved} <= set(g) for g in groups)):
            expected.add(other)
    found = list(Moves(space, rule).neighbours(levels, np.random.default_rng(0)))
    assert len(found) == len(set(found))
    assert set(found) == expected


@settings(max_examples=60)
@given(spaces(), st.integers(0, 10**6))
def test_random_exchanges_are_feasible_and_move(space: CompressionSpace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = space.uniform()
    moves = Moves(space)
    for _ in range(10):
        found = moves.random(levels, rng)
        assert found is None or (found != levels and space.feasible(found))
        levels = found or levels


def test_random_exchanges_move_budget_between_units_of_different_size() -> None:
    """From uniform, the budget of the large unit reaches the small ones and comes back."""
    units = [Unit("large", (16, 24, 32), size=8), *(Unit(f"small{i}", (2, 3, 4), size=1) for i in range(12))]
    space = CompressionSpace.from_average(units, 3)
    rng = np.random.default_rng(0)
    levels, seen = space.uniform(), set()
    for _ in range(300):
        levels = Moves(space).random(levels, rng) or levels
        seen.add(levels[0])
    assert seen == {0, 1, 2}


def test_more_changes_than_units_cost_no_more_than_all_units(monkeypatch: pytest.MonkeyPatch) -> None:
    space = CompressionSpace([Unit(f"u{i}", (0, 1, 2)) for i in range(30)], 30)
    monkeypatch.setattr("searchers.additive.solvers.solve_with_prices", None)
    effects = [[0.0, -float(i), -2.0 * i] for i in range(30)]
    assert solve_many(space, [effects], changes=10**5) == solve_many(space, [effects], changes=30)


def test_costs_beyond_64_bits_are_solved_as_the_same_costs_on_a_small_scale() -> None:
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(6, 3)).tolist()
    small = CompressionSpace([Unit(f"u{i}", (1, 2, 3)) for i in range(6)], 12)
    for scale in (2**63, 2**90):
        large = CompressionSpace([Unit(f"u{i}", (scale, 2 * scale, 3 * scale)) for i in range(6)], 12 * scale)
        for changes in (None, 2):
            expected = solve(small, effects, changes=changes)
            assert solve(large, effects, changes=changes) == expected
            assert solve_by_integer_programming(large, effects, start=large.lowest, changes=changes) == expected
        assert large.count() == small.count()
        assert small.feasible(large.sample(np.random.default_rng(0)))


def test_costs_that_no_solver_here_holds_exactly_are_refused() -> None:
    units = [Unit(f"u{i}", (2**62 + i, 2**63 + 17 * i, 2**64 + i * i)) for i in range(9)]
    space = CompressionSpace(units, 2**66 + 12345)
    for solver in (solve_by_integer_programming, solve):
        with pytest.raises(InvalidSpaceError, match="count in larger units"):
            solver(space, [[0.0, -1.0, -2.0]] * 9)
