"""Encodings: always feasible, able to express every assignment worth having, and what each one promises."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evo_hpo import Assignment, CompressionSpace, Unit
from evo_hpo.errors import InvalidSettingError
from searchers.foreign.encoding import ENCODINGS, Encoding, Sequential, make_encoding

SPACES = {
    "equal": CompressionSpace([Unit(f"u{i}", (2, 3, 4, 5)) for i in range(5)], budget=16),
    "unequal": CompressionSpace([Unit(f"u{i}", tuple((1 + i) * c for c in (2, 3, 4))) for i in range(5)], budget=44),
    "exact": CompressionSpace([Unit(f"u{i}", (0, 1)) for i in range(8)], budget=3, floor=3),
    "fixed": CompressionSpace([Unit(f"u{i}", (2, 4, 8), fixed=1 if i == 2 else None) for i in range(5)], budget=20),
    "gaps": CompressionSpace([Unit("a", (0, 7)), Unit("b", (0, 5, 6)), Unit("c", (1,)), Unit("d", (2, 9))], budget=13),
    "two resources": CompressionSpace(
        [Unit(f"u{i}", ((0, 3), (1, 2), (3, 0))) for i in range(5)], budget=(8, 9), resources=("bits", "modules")
    ),
}


def make(name: str, space: CompressionSpace, seed: int = 0, fill: bool = True) -> Encoding:
    return make_encoding(name, space, np.random.default_rng(seed), fill=fill)


def maximal(space: CompressionSpace) -> list[Assignment]:
    """Feasible assignments in which no unit can be raised, by brute force."""
    feasible = set(space.enumerate())
    return [a for a in feasible if not any((*a[:i], a[i] + 1, *a[i + 1 :]) in feasible for i in range(len(a)))]


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("name", ENCODINGS)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), fill=st.booleans(), seed=st.integers(0, 5))
def test_every_proposal_becomes_a_feasible_assignment(
    name: str, space: CompressionSpace, data: st.DataObject, fill: bool, seed: int
) -> None:
    encoding = make(name, space, seed, fill)
    far = st.floats(-10, 10, allow_nan=False)
    point = data.draw(st.lists(far, min_size=len(encoding.free), max_size=len(encoding.free)))
    decoded = encoding.decode(point)
    assert space.feasible(decoded.levels)
    assert len(decoded.told) == len(encoding.free)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", ENCODINGS)
def test_every_assignment_that_spends_the_budget_can_be_expressed(name: str, space: str) -> None:
    encoding = make(name, SPACES[space])
    for levels in maximal(SPACES[space]):
        decoded = encoding.decode(encoding.encode(levels))
        assert decoded.levels == levels
        assert decoded.told == encoding.encode(levels)
        assert decoded.excess == 0


def test_projection_is_the_nearest_assignment() -> None:
    space = SPACES["equal"]
    encoding = make("projection", space, fill=False)
    assignments = list(space.enumerate())
    rng = np.random.default_rng(1)
    for _ in range(200):
        point = rng.uniform(0, 3, len(space))

        def distance(a: Assignment, point: np.ndarray[tuple[int], np.dtype[np.float64]] = point) -> float:
            return float(((np.array(a) - point) ** 2).sum())

        assert distance(encoding.decode(point.tolist()).levels) == pytest.approx(min(map(distance, assignments)))


def test_keys_rise_and_sink_together() -> None:
    """With steps of equal cost, water-filling has a closed form: one level of water for all units."""
    space = SPACES["equal"]
    encoding = make("keys", space)
    rng = np.random.default_rng(2)
    for _ in range(100):
        keys = rng.random(len(space))
        steps = sorted((3 * x - k for x, k in itertools.product(keys, range(3))), reverse=True)
        water = steps[space.budget - space.cost(space.lowest) - 1]
        expected = [sum(3 * x - k >= water for k in range(3)) for x in keys]
        assert list(encoding.decode(keys.tolist()).levels) == expected


@pytest.mark.parametrize("name", ["repaired", "projection", "sequential"])
def test_no_position_is_favoured(name: str) -> None:
    """Proposals that treat all units alike must lead to assignments that do, however early a unit comes."""
    space = CompressionSpace([Unit(f"u{i}", (0, 1, 2)) for i in range(6)], budget=5)
    encoding = make(name, space)
    rng = np.random.default_rng(3)
    total = np.zeros(6)
    for _ in range(3000):
        if isinstance(encoding, Sequential):
            total += encoding.suggest(lambda i, low, high: int(rng.integers(low, high + 1))).levels
        else:
            total += encoding.decode(rng.integers(0, 3, 6).tolist()).levels
    assert np.ptp(total / 3000) < 0.1  # standard error of a mean is 0.015


def test_native_is_one_fixed_map_and_tells_the_proposal() -> None:
    encoding = make("native", SPACES["equal"])
    point = [3.0, 3.0, 3.0, 3.0, 3.0]
    assert len({encoding.decode(point).levels for _ in range(20)}) == 1
    assert encoding.decode(point).told == tuple(point)
    fresh = make("projection", SPACES["equal"])
    assert len({fresh.decode(point).levels for _ in range(20)}) > 1


@pytest.mark.parametrize("space", ["exact", "gaps", "two resources"])
@pytest.mark.parametrize("name", ["native", "keys", "penalty"])
def test_one_point_is_one_assignment_also_under_floors_and_two_resources(name: str, space: str) -> None:
    encoding = make(name, SPACES[space])
    rng = np.random.default_rng(5)
    for _ in range(20):
        point = rng.uniform(0, 1 if encoding.continuous else 2, len(encoding.free)).tolist()
        assert len({encoding.decode(point).levels for _ in range(5)}) == 1


@pytest.mark.parametrize("name", ["repaired", "projection", "native", "keys"])
def test_two_resources_are_filled_as_one_is(name: str) -> None:
    encoding = make(name, SPACES["two resources"])
    best = set(maximal(SPACES["two resources"]))
    rng = np.random.default_rng(6)
    for _ in range(50):
        point = rng.uniform(0, 1 if encoding.continuous else 2, len(encoding.free)).tolist()
        assert encoding.decode(point).levels in best


def test_the_excess_is_relative_to_the_budget() -> None:
    assert make("penalty", SPACES["equal"]).decode([3] * 5).excess == pytest.approx((25 - 16) / 16)
    assert make("set_constraint", SPACES["equal"]).decode([0] * 5).excess == 0


def test_fill_spends_what_is_left_and_can_be_switched_off() -> None:
    space = SPACES["equal"]
    for name in ("repaired", "projection", "native"):
        assert space.slack(make(name, space).decode([0] * 5).levels) == 0
        assert make(name, space, fill=False).decode([0] * 5).levels == (0,) * 5


@pytest.mark.parametrize("space", [s for n, s in SPACES.items() if n != "two resources"])
def test_sequential_offers_only_what_the_rest_allows_and_reaches_everything(space: CompressionSpace) -> None:
    encoding = make("sequential", space)
    assert isinstance(encoding, Sequential)
    rng = np.random.default_rng(4)
    reached: Counter[Assignment] = Counter()
    for _ in range(4000):
        asked: list[float] = [0.0] * len(encoding.free)

        def offer(i: int, low: int, high: int, asked: list[float] = asked) -> int:
            level = int(rng.integers(low, high + 1))
            asked[i] = level
            return level

        decoded = encoding.suggest(offer)
        assert decoded.told == tuple(asked)  # nothing had to be settled afterwards
        reached[decoded.levels] += 1
    everything = set(space.enumerate())
    assert set(reached) <= everything
    assert len(reached) > 0.9 * min(len(everything), 300)


def test_an_unknown_encoding_names_the_known_ones() -> None:
    with pytest.raises(InvalidSettingError, match="repaired, projection, native"):
        make("nearest", SPACES["equal"])


@pytest.mark.parametrize("name", ["repaired", "projection", "native"])
def test_without_filling_no_more_is_spent_than_the_floor_demands(name: str) -> None:
    space = CompressionSpace([Unit(f"u{i}", (0, 1)) for i in range(10)], budget=8, floor=2)
    assert space.cost(make(name, space, fill=False).decode([0.0] * 10).levels) == 2
    assert space.cost(make(name, space).decode([0.0] * 10).levels) == 8
