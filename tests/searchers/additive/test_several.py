"""Additive losses from prices, under any number of budgets: against listing every assignment, and an integer solver."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evo_hpo.space.compression_space import CompressionSpace, Unit
from searchers.additive import several
from searchers.additive.several import solve_with_prices
from searchers.additive.solvers import solve, solve_by_integer_programming
from tests.spaces import all_feasible, spaces


def total(effects: list[list[float]], levels: tuple[int, ...]) -> float:
    return sum(effects[u][k] for u, k in enumerate(levels))


@settings(max_examples=80)
@given(spaces(resources=1) | spaces(resources=2), st.data())
def test_no_feasible_assignment_is_better(space: CompressionSpace, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    effects = [rng.normal(size=len(u.costs)).round(1).tolist() for u in space.units]
    for u, unit in enumerate(space.units):
        if len(unit.costs) > 1 and unit.fixed is None and rng.random() < 0.2:
            effects[u][int(rng.integers(len(unit.costs)))] = math.inf
    start = space.sample(rng)
    changes = data.draw(st.none() | st.integers(0, 3))
    found = solve_with_prices(space, effects, start=start, changes=changes)
    losses = [
        total(effects, levels)
        for levels in all_feasible(space)
        if changes is None or sum(a != b for a, b in zip(levels, start, strict=True)) <= changes
    ]
    least = min(losses, default=math.inf)
    if math.isinf(least):
        assert found is None
    else:
        assert found is not None
        assert space.feasible(found)
        assert changes is None or sum(a != b for a, b in zip(found, start, strict=True)) <= changes
        assert total(effects, found) == pytest.approx(least)
        near = solve_with_prices(space, effects, start=start, changes=changes, exact=False)
        assert near in [a for a in all_feasible(space) if total(effects, a) >= least - 1e-9]
        assert changes is None or sum(a != b for a, b in zip(near or (), start, strict=True)) <= changes


def many(units: int, *, exact: bool) -> CompressionSpace:
    """Layers of three shapes; the second resource does not rise with the first."""
    made = []
    for i in range(units):
        size = (3, 1, 8)[i % 3]
        made.append(Unit(f"m{i}", tuple((size * b, size * t) for b, t in ((18, 35), (22, 66), (24, 65), (34, 47)))))
    cost = sum(u.costs[(0, 1, 1, 2)[i % 4]][0] for i, u in enumerate(made))  # type: ignore[index, misc]
    slow = sum(u.costs[(0, 1, 3, 2)[i % 4]][1] for i, u in enumerate(made))  # type: ignore[index, misc]
    return CompressionSpace(made, (cost, slow), floor=(cost if exact else 0, 0))


@pytest.mark.parametrize("changes", [None, 6])
@pytest.mark.parametrize("exact", [False, True])
def test_many_units_are_solved_as_a_mixed_integer_solver_does(exact: bool, changes: int | None) -> None:
    space, rng = many(60, exact=exact), np.random.default_rng(0)
    start = space.uniform()
    for _ in range(3):
        effects = (rng.gamma(1.0, 1.0, (60, 1)) * 4.0 ** -np.arange(4)).tolist()
        found = solve(space, effects, start=start, changes=changes)
        other = solve_by_integer_programming(space, effects, start=start, changes=changes)
        assert found is not None
        assert other is not None
        assert total(effects, found) == pytest.approx(total(effects, other), rel=1e-9)


@pytest.mark.parametrize("changes", [None, 6])
def test_fine_costs_are_solved_as_a_mixed_integer_solver_does(changes: int | None) -> None:
    """One resource whose costs have nothing in common, so that a table of them would be too long."""
    rng = np.random.default_rng(0)
    costs = np.sort(rng.integers(1, 10**6, (60, 11)), 1)
    space = CompressionSpace([Unit(f"u{i}", tuple(map(int, row))) for i, row in enumerate(costs)], 24 * 10**6)
    start = space.uniform()
    for floor in (0, 24 * 10**6 - 50_000):
        space = CompressionSpace(space.units, space.budget, floor=floor)
        effects = (np.exp(rng.normal(0, 1.2, (60, 1))) * np.exp(-5e-6 * costs)).tolist()
        found, other = solve(space, effects, start=start, changes=changes), None
        other = solve_by_integer_programming(space, effects, start=start, changes=changes)
        assert found is not None
        assert other is not None
        assert space.feasible(found)
        assert total(effects, found) == pytest.approx(total(effects, other), rel=1e-9)


def test_what_deviates_in_several_units_is_found_where_the_floor_asks_for_it() -> None:
    units = [*(Unit(f"a{i}", (0, 3)) for i in range(3)), Unit("b", (0, 10))]
    effects = [[0.0, -10.0]] * 3 + [[0.0, -1.0]]
    assert solve_with_prices(CompressionSpace(units, 10, floor=10), effects) == (0, 0, 0, 1)
    rng = np.random.default_rng(0)
    for gap in (0, 1, 5) * 20:
        units = [Unit(f"u{i}", tuple(np.cumsum(rng.integers(1, 30, 4)).tolist())) for i in range(5)]
        budget = sum(int(rng.choice(unit.costs)) for unit in units)
        space = CompressionSpace(units, budget, floor=budget - gap)
        effects = rng.normal(size=(5, 4)).tolist()
        found = solve_with_prices(space, effects)
        assert found is not None
        assert total(effects, found) == pytest.approx(min(total(effects, a) for a in all_feasible(space)))


def test_a_start_that_nothing_better_is_found_for_stays() -> None:
    """Where costs are fine, exact sums of them are found by luck."""
    rng = np.random.default_rng(0)
    costs = np.cumsum(rng.integers(1, 10**6, (40, 6)), 1).tolist()
    start = tuple(rng.integers(0, 6, 40).tolist())
    budget = sum(row[k] for row, k in zip(costs, start, strict=True))
    space = CompressionSpace([Unit(f"u{i}", tuple(row)) for i, row in enumerate(costs)], budget, floor=budget)
    effects = rng.normal(size=(40, 6)).tolist()
    found = solve_with_prices(space, effects, start=start, changes=6)
    assert found is not None
    assert space.feasible(found)
    assert total(effects, found) <= total(effects, start)


def test_few_labels_still_give_a_feasible_assignment_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    space, rng = many(60, exact=False), np.random.default_rng(1)
    effects = (rng.gamma(1.0, 1.0, (60, 1)) * 4.0 ** -np.arange(4)).tolist()
    best = solve(space, effects)
    monkeypatch.setattr(several, "MOST_LABELS", 50)
    found = solve(space, effects)
    assert best is not None
    assert found is not None
    assert space.feasible(found)
    assert total(effects, best) <= total(effects, found) < 1.02 * total(effects, best)
