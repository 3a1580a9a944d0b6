"""The space: exact integer costs, feasibility by its definition, neighbours, uniform compression, errors."""

from __future__ import annotations

import itertools
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evo_hpo.errors import EvoHpoError, InfeasibleError, InvalidSpaceError
from evo_hpo.space.compression_space import CompressionSpace, Unit
from tests.spaces import all_feasible, spaces

TINY = CompressionSpace([Unit(f"layers.{i}.q_proj", (2, 3, 4)) for i in range(4)], 12)


@settings(max_examples=60)
@given(spaces())
def test_feasible_is_what_the_definition_says(space: CompressionSpace) -> None:
    expected = set(all_feasible(space))
    for levels in itertools.product(*(range(-1, len(u.costs) + 1) for u in space.units[:4])):
        whole = (*levels, *space.lowest[4:])
        assert space.feasible(whole) == (whole in expected)


@settings(max_examples=60)
@given(spaces())
def test_json_gives_an_equal_space_back(space: CompressionSpace) -> None:
    again = CompressionSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert again == space
    assert hash(again) == hash(space)
    assert again.count() == space.count()
    assert pickle.loads(pickle.dumps(space)) == space


@settings(max_examples=60)
@given(spaces())
def test_uniform_is_feasible(space: CompressionSpace) -> None:
    assert space.feasible(space.uniform())


@settings(max_examples=60)
@given(spaces(), st.sampled_from(["size", "name", "none"]))
def test_switches_are_all_feasible_pairs_of_one_step_within_a_group(space: CompressionSpace, rule: str) -> None:
    levels = all_feasible(space)[-1]
    expected = set()
    for members in space.groups(rule).values():
        for down, up in itertools.permutations(members, 2):
            changed = list(levels)
            changed[down] -= 1
            changed[up] += 1
            if min(changed) >= 0 and space.feasible(changed):
                expected.add(tuple(changed))
    found = list(space.switches(levels, rule))
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_groups_follow_size_name_or_nothing() -> None:
    units = [
        Unit(f"model.layers.{b}.{name}", (2 * size, 3 * size), size=size)
        for b in range(2)
        for name, size in (("q", 4), ("k", 1), ("v", 1))
    ]
    space = CompressionSpace(units, 30)
    assert sorted(space.groups("size").values()) == [(0, 3), (1, 2, 4, 5)]
    assert sorted(space.groups("name").values()) == [(0, 3), (1, 4), (2, 5)]
    assert list(space.groups("none").values()) == [(0, 1, 2, 3, 4, 5)]
    assert [u.block for u in units] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(InvalidSpaceError, match="size, name, none"):
        space.groups("depth")


def test_sparsity_levels_of_equal_step_switch_across_sizes() -> None:
    """One level step removes the same number of weights in every unit, so the exchange is exact."""
    units = [Unit("small", (40, 50, 60), size=80, group="step"), Unit("large", (140, 150, 160), size=200, group="step")]
    space = CompressionSpace(units, 200, floor=200)
    assert set(space.switches((1, 1))) == {(0, 2), (2, 0)}


def test_uniform_shares_one_level_and_spreads_the_rest_of_a_fractional_budget() -> None:
    units = [Unit(f"layers.{i}.m", (2, 3, 4)) for i in range(16)]
    assert set(CompressionSpace.from_average(units, 3).uniform()) == {1}
    spread = CompressionSpace.from_average(units, "3.25").uniform()
    assert sum(spread) == 16 + 4
    raised = [i for i, level in enumerate(spread) if level == 2]
    assert raised == [0, 4, 8, 12]  # evenly over the depth


@pytest.mark.parametrize("resources", [1, 2])
def test_uniform_drops_every_kind_of_module_in_equal_shares_over_the_depth(resources: int) -> None:
    kept = {"attn": (1, 0)[:resources], "mlp": ((1,), (0, 1))[resources - 1]}
    dropped = (0,) * resources
    units = [Unit(f"{i}.{kind}", (dropped, kept[kind]), size=5 + len(kind)) for i in range(16) for kind in kept]
    levels = CompressionSpace(units, (24,) if resources == 1 else (12, 12)).uniform()
    for kind in (0, 1):
        assert [i for i, level in enumerate(levels[kind::2]) if not level] == [3, 7, 11, 15]


def test_uniform_keeps_to_a_budget_of_dropped_modules_and_spends_the_bits() -> None:
    """The second resource falls as the first rises: the cheapest assignment drops everything, which is not allowed."""
    units = [Unit(f"{i}.attn", ((0, 1), (2, 0), (3, 0), (4, 0))) for i in range(12)]
    space = CompressionSpace(units, (30, 3), resources=("bits", "dropped"))
    assert sorted(space.uniform()) == [1] * 6 + [2] * 6
    tight = CompressionSpace(units, (19, 3), resources=("bits", "dropped"))
    assert tight.costs(tight.uniform()) == (19, 3)
    assert CompressionSpace(units, (24, 0), resources=("bits", "dropped")).uniform() == (1,) * 12


def test_uniform_of_uneven_levels_is_the_highest_shared_cost_a_weight() -> None:
    units = [Unit("a", (4, 8)), Unit("b", (2, 3, 4, 6)), Unit("c", (20, 40, 60), size=10)]
    space = CompressionSpace(units, 48)
    assert space.uniform() == (0, 2, 1)


def test_an_average_above_the_dearest_level_is_refused() -> None:
    units = [Unit(f"u{i}", costs=(20, 30, 40), size=10) for i in range(3)]
    assert CompressionSpace.from_average(units, 4).uniform() == (2, 2, 2)
    with pytest.raises(InfeasibleError, match="from 2 to 4"):
        CompressionSpace.from_average(units, 4.5)


def test_from_average_counts_exactly_and_rounds_down() -> None:
    units = [Unit(f"m{i}", (20, 30, 40), size=10) for i in range(3)]
    assert CompressionSpace.from_average(units, 3).budget == 90
    assert CompressionSpace.from_average(units, "3.35").budget == 100
    assert (
        CompressionSpace.from_average([Unit("a", (0, 1, 2, 3)), Unit("b", (0, 1, 2, 3)), Unit("c", (0, 3))], 0.1).budget
        == 0
    )


def test_least_step_and_two_levels_look_at_units_that_may_change() -> None:
    fixed = Unit("fixed", (1, 2, 3), fixed=1)
    space = CompressionSpace([fixed, Unit("a", (20, 20, 28)), Unit("b", (5, 10))], 100)
    assert (space.knapsack.least_step, space.two_levels) == (5, False)
    assert CompressionSpace([fixed, Unit("b", (5, 10))], 100).two_levels
    assert CompressionSpace([fixed], 100).knapsack.least_step == 1


def test_a_module_belongs_to_one_unit() -> None:
    tied = Unit("embeddings", (1, 2), members=("embed", "head"))
    assert CompressionSpace([tied, Unit("other", (1, 2))], 3).count() == 3
    with pytest.raises(InvalidSpaceError, match="'head' belongs to units 'embeddings' and 'head'"):
        CompressionSpace([tied, Unit("head", (1, 2))], 3)


def test_an_average_of_the_first_resource_with_totals_of_the_others() -> None:
    units = [Unit(f"m{i}", ((20, 1), (30, 0), (40, 0)), size=10) for i in range(4)]
    space = CompressionSpace.from_average(units, 3, others=[1], resources=("bits", "lowest"))
    assert (space.budgets, space.resources) == ((120, 1), ("bits", "lowest"))
    brute = [a for a in itertools.product(range(3), repeat=4) if sum(a) <= 4 and a.count(0) <= 1]
    assert list(space.enumerate()) == brute
    assert CompressionSpace.from_average(units, 3, others=np.array([1])).budgets == (120, 1)  # type: ignore[arg-type]
    for others in ((), (1, 2)):
        with pytest.raises(InvalidSpaceError, match="each resource after the first, 1 here"):
            CompressionSpace.from_average(units, 3, others=others)
    with pytest.raises(InvalidSpaceError, match="None is not an integer"):
        CompressionSpace.from_average(units, 3, others=None)  # type: ignore[arg-type]
    with pytest.raises(InvalidSpaceError, match="after the first, 0 here"):
        CompressionSpace.from_average([Unit("m", (20, 30))], 3, others=[1])


def test_cost_slack_and_average() -> None:
    assert TINY.cost((0, 1, 2, 0)) == 11
    assert TINY.slack((0, 1, 2, 0)) == 1
    assert TINY.slack((2, 2, 2, 2)) == -4
    assert TINY.average((0, 1, 2, 0)) == pytest.approx(11 / 4)
    two = CompressionSpace([Unit("a", ((1, 5), (2, 7))), Unit("b", ((1, 1), (9, 0)))], (20, 20))
    assert two.costs((1, 1)) == (11, 7)


def test_labels_round_trip() -> None:
    units = [Unit("a", (2, 3), levels=("2", "3")), Unit("b", (0, 1), levels=("dropped", "kept"))]
    space = CompressionSpace(units, 4)
    assert space.labels((1, 0)) == {"a": "3", "b": "dropped"}
    assert space.from_labels({"a": "3", "b": "dropped"}) == (1, 0)
    with pytest.raises(InvalidSpaceError, match="allowed: dropped, kept"):
        space.from_labels({"a": "3", "b": "half"})
    with pytest.raises(InvalidSpaceError, match="unknown unit 'c'"):
        space.from_labels({"a": "3", "b": "kept", "c": "3"})


def test_tied_modules_are_one_unit_with_members() -> None:
    unit = Unit("qkv", (6, 9), members=["q", "k", "v"], size=3)  # type: ignore[arg-type]
    assert unit.members == ("q", "k", "v")
    assert Unit("o", (2, 3)).members == ("o",)


def test_fixed_units_cannot_change() -> None:
    space = CompressionSpace([Unit("a", (1, 2, 3), fixed=1), Unit("b", (1, 2, 3))], 5)
    assert space.lowest == (1, 0)
    assert space.highest == (1, 2)
    assert not space.feasible((0, 0))
    assert {a for a, _ in space.enumerate()} == {1}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Unit("a", ()), "no levels"),
        (lambda: Unit("a", (3, 2)), "ascending"),
        (lambda: Unit("a", (-1, 2)), ">= 0"),
        (lambda: Unit("a", (2.5, 3)), "not an integer"),  # type: ignore[arg-type]
        (lambda: Unit("a", (2, 3), levels=("2",)), "1 level labels for 2 costs"),
        (lambda: Unit("a", (2, 3), size=0), "size 0"),
        (lambda: Unit("a", (2, 3), fixed=2), "must be in 0..1"),
        (lambda: Unit("a", ((1, 2), (3,))), "same resources"),
        (lambda: CompressionSpace([], 3), "at least one unit"),
        (lambda: CompressionSpace([Unit("a", (1,)), Unit("a", (2,))], 3), "found twice: 'a'"),
        (lambda: CompressionSpace([Unit("a", (1, 2)), Unit("b", ((1, 2), (3, 4)))], 3), "resource"),
        (lambda: CompressionSpace([Unit("a", (1, 2))], (3, 4)), "one integer for each"),
        (lambda: CompressionSpace([Unit("a", (2, 3))], 1), "below the cheapest assignment, 2"),
        (lambda: CompressionSpace([Unit("a", (2, 3))], 9, floor=4), "above the dearest assignment, 3"),
        (lambda: CompressionSpace([Unit("a", (2, 3))], 2, floor=3), "above the budget 2"),
    ],
)
def test_spaces_that_make_no_sense_are_refused_with_the_reason(make: object, words: str) -> None:
    with pytest.raises(EvoHpoError, match=words.replace("(", r"\(")):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("levels", "words"),
    [((1, 1, 1), "3 levels, the space has 4"), ((0, 0, 0, 3), "level 3, allowed 0..2"), ((2, 2, 2, 2), "costs")],
)
def test_check_says_why_an_assignment_is_infeasible(levels: tuple[int, ...], words: str) -> None:
    with pytest.raises(InfeasibleError, match=words):
        TINY.check(levels)
    assert TINY.check(np.array([1, 1, 1, 1])) == (1, 1, 1, 1)  # type: ignore[arg-type]


def test_describe_names_units_groups_and_budget() -> None:
    text = CompressionSpace([Unit("a", (20, 30), size=10, group="1x10"), Unit("b", (2, 3), fixed=0)], 30).describe()
    assert "2 units, 11 weights" in text
    assert "group 1x10: 1 units" in text
    assert "fixed: 1 units" in text
    assert "at most 30" in text


def test_uniform_spreads_what_an_exact_budget_drops() -> None:
    units = [Unit(f"layers.{i}", (0, 1), levels=("dropped", "kept")) for i in range(15)]
    dropped = [i for i, level in enumerate(CompressionSpace(units, 10, floor=10).uniform()) if level == 0]
    assert dropped == [i for i, level in enumerate(CompressionSpace(units, 10).uniform()) if level == 0]
    assert len(dropped) == 5
    assert max(b - a for a, b in itertools.pairwise(dropped)) <= 4


def test_inputs_of_the_wrong_kind_are_refused_with_the_reason() -> None:
    unit = Unit("a", (0, 4), size=np.int64(4))  # type: ignore[arg-type]
    assert CompressionSpace([unit], 4).to_json()["units"][0]["size"] == 4
    with pytest.raises(InvalidSpaceError, match=r"size 2\.5 is not an integer"):
        Unit("a", (0, 1), size=2.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidSpaceError, match="must differ"):
        Unit("a", (0, 1), levels=("x", "x"))
    space = CompressionSpace([Unit("a", (0, 1)), Unit("b", (0, 1))], 1)
    with pytest.raises(InvalidSpaceError, match=r"level 0\.9 is not an integer"):
        space.check((0.9, 0.9))  # type: ignore[arg-type]
    for wrong in ("abc", float("nan")):
        with pytest.raises(InvalidSpaceError, match="not a number"):
            CompressionSpace.from_average(space.units, wrong)


def test_a_space_is_pickled_without_the_sampling_table() -> None:
    space = CompressionSpace([Unit(f"u{i}", (0, 100, 201, 303)) for i in range(100)], 12_345)
    before = len(pickle.dumps(space))
    space.sample(np.random.default_rng(0))
    assert len(pickle.dumps(space)) == before


@pytest.mark.parametrize("names", ["bits", ("bits",), ("a", "b", "c")])
def test_names_for_another_number_of_resources_are_refused(names: str | tuple[str, ...]) -> None:
    with pytest.raises(InvalidSpaceError, match="each of the 2 resources"):
        CompressionSpace([Unit("a", ((0, 1), (1, 2)))], (1, 2), resources=names)


def test_an_average_that_divides_by_nothing_is_no_number() -> None:
    with pytest.raises(InvalidSpaceError, match="not a number"):
        CompressionSpace.from_average(TINY.units, "1/0")


def test_the_summary_lists_levels_in_one_order() -> None:
    units = [Unit(f"u{i}", (0, 1), levels=pair, group="g") for i, pair in enumerate(itertools.permutations("abcd", 2))]
    labels = CompressionSpace(units, 6).describe().splitlines()[1].partition("levels ")[2].split(" | ")
    assert labels == sorted(labels)
