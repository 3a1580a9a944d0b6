"""Repair: always feasible, leaves feasible proposals alone, stays close, and favours no position."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from evo_hpo.errors import InvalidSpaceError
from evo_hpo.space.compression_space import CompressionSpace, Unit
from tests.spaces import all_feasible, spaces


@settings(max_examples=150)
@given(spaces(), st.data())
def test_the_result_is_feasible_whatever_the_proposal(space: CompressionSpace, data: st.DataObject) -> None:
    wish = data.draw(st.lists(st.floats(-3, 8), min_size=len(space), max_size=len(space)))
    assert space.feasible(space.repair(wish))
    assert space.feasible(space.repair(wish, np.random.default_rng(0), fill=True))


@settings(max_examples=100)
@given(spaces(), st.data())
def test_feasible_assignments_stay_as_they_are(space: CompressionSpace, data: st.DataObject) -> None:
    levels = data.draw(st.sampled_from(all_feasible(space)))
    assert space.repair(levels) == levels


@settings(max_examples=100)
@given(spaces(), st.data())
def test_the_same_proposal_gives_the_same_result(space: CompressionSpace, data: st.DataObject) -> None:
    wish = data.draw(st.lists(st.floats(0, 4), min_size=len(space), max_size=len(space)))
    assert space.repair(wish) == space.repair(wish)
    assert space.repair(wish, np.random.default_rng(3)) == space.repair(wish, np.random.default_rng(3))


@settings(max_examples=100)
@given(st.lists(st.floats(0, 3), min_size=2, max_size=6), st.data())
def test_with_equal_costs_no_feasible_assignment_is_nearer(wish: list[float], data: st.DataObject) -> None:
    """Greedy steps are optimal where every step frees the same cost."""
    budget = data.draw(st.integers(len(wish) * 2, len(wish) * 5))
    space = CompressionSpace([Unit(f"m{i}", (2, 3, 4, 5)) for i in range(len(wish))], budget)
    distances = [sum(abs(a - w) for a, w in zip(levels, wish, strict=True)) for levels in space.enumerate()]
    repaired = sum(abs(a - w) for a, w in zip(space.repair(wish), wish, strict=True))
    assert repaired == pytest.approx(min(distances))


@settings(max_examples=60)
@given(spaces(resources=2), st.data())
def test_with_two_resources_no_feasible_assignment_is_nearer(space: CompressionSpace, data: st.DataObject) -> None:
    wish = data.draw(st.lists(st.floats(0, 3), min_size=len(space), max_size=len(space)))
    repaired = space.repair(wish)
    distances = [sum(abs(a - w) for a, w in zip(levels, wish, strict=True)) for levels in all_feasible(space)]
    assert sum(abs(a - w) for a, w in zip(repaired, wish, strict=True)) == pytest.approx(min(distances), abs=1e-6)


@settings(max_examples=100)
@given(spaces(resources=1, floors=False), st.data())
def test_fill_leaves_no_step_that_would_fit(space: CompressionSpace, data: st.DataObject) -> None:
    wish = data.draw(st.lists(st.floats(0, 3), min_size=len(space), max_size=len(space)))
    filled = space.repair(wish, fill=True)
    assume(space.feasible(filled))
    for i, unit in enumerate(space.units):
        if unit.fixed is None and filled[i] + 1 < len(unit.costs):
            raised = (*filled[:i], filled[i] + 1, *filled[i + 1 :])
            assert not space.feasible(raised) or unit.costs[filled[i]] == unit.costs[filled[i] + 1]


def test_random_ties_favour_no_position() -> None:
    """Every unit is lowered equally often, without and with a generator that breaks the ties."""
    space = CompressionSpace([Unit(f"m{i}", (1, 2)) for i in range(8)], 12)
    rng = np.random.default_rng(0)
    lowered = np.sum([1 - np.array(space.repair([1] * 8, rng)) for _ in range(2000)], axis=0)
    assert lowered.sum() == 4 * 2000
    assert abs(lowered - 1000).max() < 120  # five standard deviations


def test_without_a_generator_ties_go_to_later_units() -> None:
    space = CompressionSpace([Unit(f"m{i}", (1, 2)) for i in range(4)], 6)
    assert space.repair([1, 1, 1, 1]) == (1, 1, 0, 0)


@pytest.mark.parametrize("wish", [[1.0], [float("nan")] * 3, [float("inf"), 0, 0], list(itertools.repeat(0.0, 4))])
def test_proposals_that_make_no_sense_are_refused(wish: list[float]) -> None:
    space = CompressionSpace([Unit(f"m{i}", (1, 2)) for i in range(3)], 4)
    with pytest.raises(InvalidSpaceError, match="3 finite levels"):
        space.repair(wish)


steps = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=0, max_size=3)


@settings(max_examples=60)
@given(st.lists(steps, min_size=1, max_size=5), st.data())
def test_fill_leaves_no_step_that_would_fit_two_resources(
    rises: list[list[tuple[int, int]]], data: st.DataObject
) -> None:
    costs = [tuple((2 + sum(a for a, _ in r[:k]), sum(b for _, b in r[:k])) for k in range(len(r) + 1)) for r in rises]
    units = [Unit(f"m{i}", c) for i, c in enumerate(costs)]
    budget = (2 * len(units) + data.draw(st.integers(0, 9)), data.draw(st.integers(0, 6)))
    space = CompressionSpace(units, budget)
    wish = data.draw(st.lists(st.floats(0, 3), min_size=len(units), max_size=len(units)))
    filled = space.repair(wish, fill=True)
    assert space.feasible(filled)
    for i, unit in enumerate(units):
        raised = (*filled[:i], filled[i] + 1, *filled[i + 1 :])
        assert filled[i] + 1 == len(unit.costs) or not space.feasible(raised)


@settings(max_examples=60)
@given(spaces(resources=2), st.data())
def test_two_resources_of_fine_costs_are_met_too(space: CompressionSpace, data: st.DataObject) -> None:
    wish = data.draw(st.lists(st.floats(-1, 5), min_size=len(space), max_size=len(space)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evo_hpo.space.repair.SMALL", 0)
        assert space.feasible(space.repair(wish))
        assert space.feasible(space.repair(wish, np.random.default_rng(0), fill=True))


def test_single_steps_in_two_resources_stay_near_the_nearest_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    units = [
        Unit(f"m{i}", tuple((b * s, (b - 2) * (1 + i % 3)) for b in (2, 3, 4, 5))) for i, s in enumerate([1, 3] * 6)
    ]
    space = CompressionSpace(units, (80, 30))
    wishes = [rng.uniform(0, 3, 12).tolist() for _ in range(50)]

    def distance() -> float:
        return float(np.mean([np.abs(np.subtract(space.repair(w), w)).sum() for w in wishes]))

    nearest = distance()
    monkeypatch.setattr("evo_hpo.space.repair.SMALL", 0)
    monkeypatch.setattr("evo_hpo.space.repair._nearest", None)  # steps alone come to a feasible assignment here
    assert nearest <= distance() < 1.15 * nearest


def test_many_units_with_two_resources_are_repaired_without_a_table() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1000, 9000, 210).tolist()
    units = [Unit(f"m{i}", tuple((b * size, (b - 2) * 7) for b in (2, 3, 4))) for i, size in enumerate(sizes)]
    space = CompressionSpace(units, (3 * sum(sizes), 1000))
    assert space.knapsack.counter.cells > 10**9
    for _ in range(5):
        assert space.feasible(space.repair(rng.uniform(0, 2, 210).tolist(), rng, fill=True))
    assert "table" not in vars(space.knapsack.counter)


@pytest.mark.parametrize("exact", [(0,), (0, 1)], ids=["one exact cost", "two exact costs"])
@pytest.mark.parametrize(
    "sizes",
    [(1, 3, 8), tuple(np.random.default_rng(1).integers(1000, 9000, 210).tolist())],
    ids=["equal sizes", "all sizes differ"],
)
def test_exact_costs_of_many_units_are_met_near_the_proposal_without_a_table(
    sizes: tuple[int, ...], exact: tuple[int, ...]
) -> None:
    """Against the least distance with levels between the whole ones, which no assignment can beat (HiGHS)."""
    rng = np.random.default_rng(0)
    costs = np.array(
        [[(b * sizes[i % len(sizes)], (b - 2) * (1 + i * 7 % 40)) for b in (2, 3, 4, 5)] for i in range(210)]
    )
    target = costs[np.arange(210), rng.integers(0, 3, 210)].sum(0).tolist()
    budget = [t if r in exact else t + t // 50 for r, t in enumerate(target)]
    floor = [t if r in exact else 0 for r, t in enumerate(target)]
    units = [Unit(f"m{i}", tuple(map(tuple, unit))) for i, unit in enumerate(costs.tolist())]
    space = CompressionSpace(units, budget, floor=floor)
    one_each = LinearConstraint(np.kron(np.eye(210), np.ones(4)), 1, 1)
    within = LinearConstraint(costs.reshape(-1, 2).T, floor, budget)
    for highest in (2, 3, 4):
        wish = rng.uniform(0, highest, 210)
        repaired = space.repair(wish.tolist(), rng)
        assert space.feasible(repaired)
        least = milp(np.abs(np.arange(4) - wish[:, None]).ravel(), constraints=[one_each, within], bounds=Bounds(0, 1))
        assert least.fun is not None
        assert np.abs(repaired - wish).sum() < (1.15 if len(exact) == 1 else 1.4) * least.fun
    assert "table" not in vars(space.knapsack.counter)


def test_costs_beyond_64_bits_are_met_exactly_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evo_hpo.space.repair.SMALL", 0)
    monkeypatch.setattr("evo_hpo.space.repair._nearest", None)
    units = [Unit(f"m{i}", tuple((b * (10**20 + 7 * i), b % 2) for b in range(4))) for i in range(12)]
    target = sum(i % 4 * (10**20 + 7 * i) for i in range(12))
    space = CompressionSpace(units, (target, 12), floor=(target, 0))
    assert space.feasible(space.repair([3.0] * 6 + [0.0] * 6))


@settings(max_examples=60)
@given(spaces(resources=2), st.data())
def test_pairs_of_steps_come_as_near_as_a_few_steps_on_small_spaces(
    space: CompressionSpace, data: st.DataObject
) -> None:
    wish = data.draw(st.lists(st.floats(0, 3), min_size=len(space), max_size=len(space)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evo_hpo.space.repair.SMALL", 0)
        repaired = space.repair(wish)
    distances = [sum(abs(a - w) for a, w in zip(levels, wish, strict=True)) for levels in all_feasible(space)]
    assert sum(abs(a - w) for a, w in zip(repaired, wish, strict=True)) <= min(distances) + 4


def test_alike_units_do_not_all_change_at_once_where_a_budget_must_be_met_exactly() -> None:
    """A proposal of one level everywhere, at costs finer than any table."""
    rows = {"q": 331_776, "k": 110_592, "up": 884_736}
    types = ((18, 35), (20, 51), (22, 66), (24, 65), (34, 47))
    units = [
        Unit(f"{i}.{name}", tuple((size // 32 * taken, size * speed // 1000) for taken, speed in types))
        for i, (name, size) in itertools.product(range(40), rows.items())
    ]
    loose = CompressionSpace(units, (10**10, 10**10))
    cost, time = loose.costs([i % 3 for i in range(len(units))])
    space = CompressionSpace(units, (cost, time * 11 // 10), floor=(cost, 0))
    for level in range(5):
        repaired = space.repair([float(level)] * len(units), np.random.default_rng(level))
        assert space.costs(repaired)[0] == cost
        assert space.feasible(repaired)
