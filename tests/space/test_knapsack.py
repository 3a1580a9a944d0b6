"""The knapsack and its cursor against sums over all units: costs, limits, allowed steps, and where walks end."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evo_hpo.space.compression_space import CompressionSpace, Unit
from evo_hpo.space.knapsack import Knapsack
from tests.spaces import all_feasible, spaces

several = st.integers(1, 3).flatmap(lambda resources: spaces(resources=resources))


def within_levels(space: CompressionSpace) -> list[tuple[int, ...]]:
    """Every assignment whose units have levels that they may take, whatever it costs."""
    ranges = [range(len(u.costs)) if u.fixed is None else [u.fixed] for u in space.units]
    return list(itertools.product(*ranges))


def left(space: CompressionSpace, levels: tuple[int, ...]) -> tuple[int, ...]:
    """Unspent budget of every resource, summed over all units."""
    costs = [u.costs[k] for u, k in zip(space.units, levels, strict=True)]
    vectors = [c if isinstance(c, tuple) else (c,) for c in costs]
    return tuple(b - sum(v[r] for v in vectors) for r, b in enumerate(space.budgets))


def moved(levels: tuple[int, ...], unit: int, by: int) -> tuple[int, ...]:
    return (*levels[:unit], levels[unit] + by, *levels[unit + 1 :])


@settings(max_examples=80)
@given(several, st.data())
def test_the_cursor_knows_what_is_left_and_which_steps_are_allowed(
    space: CompressionSpace, data: st.DataObject
) -> None:
    allowed, feasible = set(within_levels(space)), set(all_feasible(space))
    levels = data.draw(st.sampled_from(sorted(allowed)))
    cursor = space.knapsack.cursor(levels)
    now = left(space, levels)
    assert (cursor.left, cursor.slack) == (now, now[0])
    assert cursor.within == (min(now) >= 0)
    assert cursor.feasible == (levels in feasible) == (cursor.assignment() == levels)
    for unit, by in itertools.product(range(len(space)), (-1, 1)):
        after = moved(levels, unit, by)
        assert cursor.can(unit, by) == (after in allowed)
        assert cursor.allows(unit, by) == (after in feasible) == (cursor.peek((unit, by)) == after)
        then = left(space, after) if after in allowed else now
        assert cursor.can(unit, by) <= (cursor.after(unit, by) == then if after in allowed else True)
        if by > 0:
            assert cursor.fits(unit) == (after in allowed and min(then) >= 0)
            eases = after in allowed and all(t >= min(0, n) for t, n in zip(then, now, strict=True))
            assert cursor.eases(unit) == eases
    assert tuple(cursor.levels) == levels  # looking moves nothing


@settings(max_examples=80)
@given(several, st.data())
def test_steps_there_and_back_are_followed(space: CompressionSpace, data: st.DataObject) -> None:
    cursor = space.knapsack.cursor(space.lowest)
    for _ in range(8):
        target = data.draw(st.sampled_from(within_levels(space)))
        for unit in data.draw(st.permutations(range(len(space)))):
            cursor.step(unit, target[unit] - cursor.levels[unit])
        assert tuple(cursor.levels) == target
        assert cursor.left == left(space, target)
    other = space.knapsack.cursor(target)
    other.step(0, space.highest[0] - target[0])
    assert (space.knapsack.cursor(target).left, cursor.levels) == (left(space, target), list(target))  # its own walk


@settings(max_examples=80)
@given(several, st.data())
def test_paying_and_spending_take_steps_in_the_order_given(space: CompressionSpace, data: st.DataObject) -> None:
    start = data.draw(st.sampled_from(within_levels(space)))
    order = data.draw(st.permutations(range(len(space))))
    levels, rest = start, list(order)
    while rest and min(left(space, levels)) < 0:
        unit = rest.pop(0)
        levels = moved(levels, unit, -int(levels[unit] > space.lowest[unit]))
    cursor = space.knapsack.cursor(start)
    assert list(cursor.pay(order)) == rest
    assert tuple(cursor.levels) == levels
    for unit in order:
        raised = moved(levels, unit, 1)
        if raised[unit] <= space.highest[unit] and min(left(space, raised)) >= 0:
            levels = raised
    cursor.spend(order)
    assert tuple(cursor.levels) == levels


def test_spending_ends_where_less_than_the_least_step_is_left_and_asks_for_no_more_units() -> None:
    cursor = CompressionSpace([Unit(f"u{i}", (2, 5)) for i in range(4)], 15).knapsack.cursor((0, 0, 0, 0))
    order = iter(range(4))
    cursor.spend(order, 3)
    assert (cursor.levels, cursor.slack) == ([1, 1, 0, 0], 1)
    assert list(order) == [2, 3]


@settings(max_examples=80)
@given(several)
def test_feasibility_and_costs_are_those_of_the_definition(space: CompressionSpace) -> None:
    knapsack, feasible = space.knapsack, set(all_feasible(space))
    vectors = [[c if isinstance(c, tuple) else (c,) for c in u.costs] for u in space.units]
    taken = [v if u.fixed is None else [v[u.fixed]] for u, v in zip(space.units, vectors, strict=True)]
    assert knapsack.free == tuple(i for i, levels in enumerate(taken) if len(levels) > 1)
    for levels in itertools.product(*(range(len(v)) for v in vectors)):
        spent = tuple(sum(v[k][r] for v, k in zip(vectors, levels, strict=True)) for r in range(len(space.budgets)))
        assert (knapsack.spent(levels), knapsack.cost(levels)) == (spent, spent[0])
        assert knapsack.feasible(levels) == (levels in feasible)
        assert knapsack.first.feasible(levels) >= (levels in feasible)
    beyond = (len(vectors[0]), *space.highest[1:])
    assert not knapsack.feasible(beyond)
    assert not knapsack.feasible(space.lowest[1:])


def test_a_knapsack_keeps_to_levels_between_its_limits() -> None:
    knapsack = Knapsack((((1,), (2,), (3,), (4,)),) * 2, (1, 0), (2, 3), (6,), (3,))
    brute = [a for a in itertools.product(range(4), repeat=2) if 1 <= a[0] <= 2 and 3 <= sum(a) + 2 <= 6]
    assert list(filter(knapsack.feasible, itertools.product(range(4), repeat=2))) == brute
    assert (list(knapsack.counter.enumerate()), knapsack.counter.count()) == (brute, len(brute))


@pytest.mark.parametrize(("enough", "ends"), [(0, ([0, 1, 2], 1)), (3, ([0, 0, 2], 3))])
def test_following_takes_the_least_distance_for_its_cost(enough: int, ends: tuple[list[int], int]) -> None:
    """Steps of c come first by their ties; then one of a does not fit, and one of b does where more is to be spent."""
    knapsack = CompressionSpace([Unit("a", (0, 4, 8)), Unit("b", (0, 2, 4)), Unit("c", (0, 4, 8))], 11).knapsack
    cursor = knapsack.cursor((0, 0, 0))
    cursor.follow(+1, lambda unit, by: 1.0, [2.0, 0.0, 1.0], enough)
    assert (cursor.levels, cursor.slack) == ends
    down = knapsack.cursor((2, 2, 2))
    down.follow(-1, lambda unit, by: float(down.levels[unit] == 1), [0.0, 1.0, 2.0], 0)
    assert (down.levels, down.slack) == ([1, 1, 1], 1)


def test_a_knapsack_is_pickled_as_its_fields_alone() -> None:
    knapsack = CompressionSpace([Unit(f"u{i}", (0, 100, 201)) for i in range(50)], 6_000).knapsack
    before = pickle.dumps(knapsack)
    assert knapsack.cursor(knapsack.counter.sample(np.random.default_rng(0))).feasible
    assert pickle.dumps(knapsack) == before
    assert pickle.loads(before) == knapsack
