"""Ranges of budgets: their ends, their floor, and the single budgets in them."""

from __future__ import annotations

import itertools
import math

import pytest

from evo_hpo.errors import InfeasibleError, InvalidSettingError
from evo_hpo.space.compression_space import CompressionSpace, Unit
from evo_hpo.space.ranges import at, each, ends, foot, marks, over, spanning, uniform_at

SIZES = (3, 1, 1, 3, 8)


def single(average: float) -> CompressionSpace:
    units = [
        Unit(f"layers.{b}.m{i}", tuple(s * k for k in (2, 3, 4)), size=s) for b in range(2) for i, s in enumerate(SIZES)
    ]
    return CompressionSpace.from_average(units, average)


def test_a_range_holds_what_costs_at_least_uniform_at_its_foot_and_at_most_its_budget() -> None:
    low, high = single(2.4), single(3.5)
    space = spanning(high, low)
    assert space.ranged
    assert space.budget == math.floor(3.5 * 32)
    assert space.floor == foot(space) == low.cost(low.uniform()) <= 2.4 * 32
    assert [space.feasible(a) for a in (low.uniform(), high.uniform(), high.lowest)] == [True, True, False]
    assert f"at least {space.floor} (" in space.describe()


def test_where_costs_are_finer_than_steps_an_assignment_may_leave_a_typical_step_of_its_foot() -> None:
    """Or next to nothing but uniform compression would cost so much and no more."""
    units = [Unit(f"u{i}", (1000 + i, 2003 + i * i, 3001 + 7 * i)) for i in range(5)]
    ends = CompressionSpace(units, 9000), CompressionSpace(units, 12_000)
    space, steps = spanning(*ends), [1003, 998, 1003, 1004, 1005, 1008, 1009, 1010, 1015, 1010]
    uniform = ends[0].cost(ends[0].uniform())
    assert (foot(space), space.floor) == (uniform, uniform - sorted(steps)[5])
    assert marks(space)[0] == uniform
    inside = at(space, uniform)
    found = {inside.cost(levels) for levels in inside.enumerate()}
    assert len(found) > 10
    assert max(found) == uniform
    again = CompressionSpace.from_json(space.to_json())
    assert (foot(again), again) == (uniform, space)
    older = {key: value for key, value in space.to_json().items() if key != "foot"}
    assert foot(CompressionSpace.from_json(older)) == space.floor  # which was the foot
    few = [Unit(f"u{i}", (0, 1001 + i)) for i in range(3)]
    low = spanning(CompressionSpace(few, 1001), CompressionSpace(few, 3006))
    assert (foot(low), low.floor) == (1001, 0)


def test_a_range_survives_its_description_and_a_single_budget_says_nothing_of_ranges() -> None:
    space = spanning(single(2.4), single(3.5))
    again = CompressionSpace.from_json(space.to_json())
    assert again == space
    assert again.ranged
    assert "ranged" not in single(3.0).to_json()
    assert not single(3.0).ranged


def test_marks_are_evenly_spaced_whole_budgets_that_end_where_the_range_does() -> None:
    space = spanning(single(2.4), single(3.5))
    found = marks(space)
    assert (found[0], found[-1], len(found)) == (space.floor, space.budget, 21)
    assert {b - a for a, b in itertools.pairwise(found)} <= {1, 2}
    assert marks(space, 4) == (found[0], found[5], found[10], found[15], found[20])
    assert len(marks(spanning(single(2.9), single(3.0)))) <= 21


def test_a_budget_of_the_range_keeps_its_floor_and_asks_for_no_front() -> None:
    space = spanning(single(2.4), single(3.5))
    budget = marks(space, 4)[2]
    inside = at(space, budget)
    assert (inside.budget, inside.floor, inside.ranged) == (budget, space.floor, False)
    assert all(space.feasible(a) for a in (inside.uniform(), *uniform_at(space)))


def test_uniform_compression_along_a_range_is_what_it_is_at_each_single_budget() -> None:
    space = spanning(single(2.4), single(3.5))
    alone = [CompressionSpace(space.units, budget).uniform() for budget in marks(space)]
    assert set(uniform_at(space)) == set(alone)
    costs = [space.cost(a) for a in uniform_at(space)]
    assert costs == sorted(costs)


def test_a_setting_is_one_budget_or_a_range() -> None:
    assert ends(3.0, "average") is None
    assert ends({"from": 2.2, "to": 5}, "average") == (2.2, 5)
    assert each("4 GB", "size") == ("4 GB",)
    assert over(3.0, "average", single) == single(3.0)
    assert over({"from": 2.4, "to": 3.5}, "average", single) == spanning(single(2.4), single(3.5))


@pytest.mark.parametrize("value", [{"from": 2}, {"from": 2, "to": 2}, {"from": 2, "to": 3, "by": 1}, {}])
def test_a_table_that_is_no_range_is_refused(value: dict[str, float]) -> None:
    with pytest.raises(InvalidSettingError, match=r"average=.* must be one budget, or a range: \{ from = ..., to"):
        ends(value, "average")


def test_a_range_of_one_uniform_assignment_is_refused() -> None:
    with pytest.raises(InfeasibleError, match="holds one uniform assignment: widen it"):
        spanning(single(3.0), single(3.001))
