"""The mutations against the distributions that the paper states, written out for every offspring, by chi-square."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from scipy.stats import chisquare

from evo_hpo import Assignment, CompressionSpace, Unit
from searchers.evopress.mutation import (
    Exchange,
    LevelSwitch,
    Uniforms,
    UnrestrictedSwitch,
    heavy_tailed,
    mutation,
    switch_counts,
)
from tests.searchers.landscapes import SIZES, mixed_space

DRAWS = 100_000


def single_switch_distribution(space: CompressionSpace, parent: Assignment, rule: str) -> dict[Assignment, float]:
    """The published distribution of one switch, written out: group by size, then down, then up, uniformly."""
    groups = space.groups(rule)
    total = sum(map(len, groups.values()))
    found: defaultdict[Assignment, float] = defaultdict(float)
    for members in groups.values():
        downs = [i for i in members if parent[i] > space.lowest[i]]
        for down in downs:
            ups = [i for i in members if parent[i] < space.highest[i] and i != down]
            for up in ups:
                levels = list(parent)
                levels[down] -= 1
                levels[up] += 1
                if space.feasible(levels):
                    found[tuple(levels)] += len(members) / total / len(downs) / len(ups)
    return dict(found)


@pytest.mark.parametrize("rule", ["size", "name"])
@pytest.mark.parametrize("parent", [(1, 1, 1, 1, 1, 1, 1), (0, 2, 1, 1, 2, 1, 0)])
def test_one_switch_is_distributed_as_published(rule: str, parent: Assignment) -> None:
    space = mixed_space(40)
    expected = single_switch_distribution(space, parent, rule)
    mutate, stream = LevelSwitch(space, rule), Uniforms(np.random.default_rng(1))
    drawn = Counter(mutate(parent, stream, 1) for _ in range(DRAWS))
    rejected = drawn.pop(None, 0)
    assert set(drawn) <= set(expected)
    if rule == "size":
        assert rejected == 0
    frequencies = [drawn[k] for k in expected]
    scale = sum(frequencies) / sum(expected.values())
    assert chisquare(frequencies, [p * scale for p in expected.values()]).pvalue > 1e-4


def unrestricted_distribution(space: CompressionSpace, parent: Assignment, raises: int) -> dict[Assignment, float]:
    """Without groups, as published: raises anywhere, then others lowered until the budget holds, or rejected."""
    found: defaultdict[Assignment, float] = defaultdict(float)
    units = range(len(space))

    def step(levels: Assignment, raised: frozenset[int], changes: int, chance: float) -> None:
        if changes >= raises and space.cost(levels) <= space.budget:
            added = sum(s * max(b - a, 0) for s, a, b in zip(SIZES, parent, levels, strict=True))
            freed = sum(s * max(a - b, 0) for s, a, b in zip(SIZES, parent, levels, strict=True))
            if added >= 0.8 * freed:
                found[levels] += chance
            return
        up = changes < raises
        able = [i for i in units if (levels[i] < 2 if up else levels[i] > 0 and i not in raised)]
        for i in able if changes < 10 else []:
            moved = (*levels[:i], levels[i] + (1 if up else -1), *levels[i + 1 :])
            step(moved, raised | {i} if up else raised, changes + 1, chance / len(able))

    step(parent, frozenset(), 0, 1.0)
    return dict(found)


def exchange_distribution(space: CompressionSpace, parent: Assignment, exchanges: int = 1) -> dict[Assignment, float]:
    """Exchanges across groups: a raise, others lowered to the budget, the rest spent on units not lowered."""
    found: defaultdict[Assignment, float] = defaultdict(float)
    none: frozenset[int] = frozenset()

    def moved(levels: Assignment, i: int, by: int) -> Assignment:
        return (*levels[:i], levels[i] + by, *levels[i + 1 :])

    def exchange(levels: Assignment, left: int, raised: frozenset[int], lowered: frozenset[int], chance: float) -> None:
        able = [i for i, k in enumerate(levels) if k < 2 and i not in lowered]
        for i in able:
            lower(moved(levels, i, 1), left - 1, raised | {i}, lowered, chance / len(able))

    def lower(levels: Assignment, left: int, raised: frozenset[int], lowered: frozenset[int], chance: float) -> None:
        if space.slack(levels) < 0:
            able = [i for i, k in enumerate(levels) if k > 0 and i not in raised]
            for i in able:
                lower(moved(levels, i, -1), left, raised, lowered | {i}, chance / len(able))
        elif left:
            exchange(levels, left, raised, lowered, chance)
        else:
            spend(levels, lowered, chance)

    def spend(levels: Assignment, lowered: frozenset[int], chance: float) -> None:
        able = [i for i, k in enumerate(levels) if k < 2 and i not in lowered and SIZES[i] <= space.slack(levels)]
        for i in able:
            spend(moved(levels, i, 1), lowered, chance / len(able))
        if not able:
            found[levels] += chance

    exchange(parent, exchanges, none, none, 1.0)
    return dict(found)


def assert_drawn_as(expected: dict[Assignment, float], drawn: Counter[Assignment | None]) -> None:
    """Chi-square of the accepted draws; offspring expected less than five times are put together."""
    accepted = sum(drawn[k] for k in expected)
    scale = accepted / sum(expected.values())
    common = [k for k, p in expected.items() if p * scale >= 5]
    rare = [k for k, p in expected.items() if p * scale < 5]
    counts = [float(drawn[k]) for k in common] + ([float(sum(drawn[k] for k in rare))] if rare else [])
    wanted = [expected[k] * scale for k in common] + ([sum(expected[k] for k in rare) * scale] if rare else [])
    assert chisquare(counts, wanted).pvalue > 1e-4


@pytest.mark.parametrize("raises", [1, 2])
def test_without_groups_offspring_are_distributed_as_published(raises: int) -> None:
    space, parent = mixed_space(39), (1, 1, 1, 1, 1, 1, 1)
    expected = unrestricted_distribution(space, parent, raises)
    mutate, stream = mutation(space, "none", 0.0), Uniforms(np.random.default_rng(7))
    drawn = Counter(mutate(parent, stream, raises) for _ in range(DRAWS))
    rejected = drawn[None] / DRAWS
    assert set(drawn) - {None} <= set(expected)
    assert rejected == pytest.approx(1 - sum(expected.values()), abs=0.01)
    assert_drawn_as(expected, drawn)


@pytest.mark.parametrize(("switches", "exchanges"), [(1, 1), (2, 1), (3, 2)])
def test_exchanges_across_groups_are_distributed_as_described(switches: int, exchanges: int) -> None:
    space, parent = mixed_space(39), (1, 1, 2, 0, 1, 1, 1)
    expected = exchange_distribution(space, parent, exchanges)
    mutate, stream = Exchange(space), Uniforms(np.random.default_rng(8))
    drawn = Counter(mutate(parent, stream, switches) for _ in range(DRAWS))
    assert sum(drawn[k] for k in expected) > 0.999 * DRAWS  # spending gives up after 64 picks in vain
    assert len({sum(levels[:4]) for levels in expected}) > 2  # budget moves between the groups
    assert_drawn_as(expected, drawn)


def test_groups_and_exchanges_are_mixed_as_asked() -> None:
    space, parent = mixed_space(39), (1, 1, 1, 1, 1, 1, 1)
    inside, across = single_switch_distribution(space, parent, "size"), exchange_distribution(space, parent)
    expected = {k: 0.7 * inside.get(k, 0.0) + 0.3 * across.get(k, 0.0) for k in inside | across}
    mutate, stream = mutation(space, "size", 0.3), Uniforms(np.random.default_rng(9))
    assert_drawn_as(expected, Counter(mutate(parent, stream, 1) for _ in range(DRAWS)))


def test_the_number_of_switches_is_the_smaller_of_two_uniform_draws() -> None:
    stream, rule = Uniforms(np.random.default_rng(2)), switch_counts("min_of_two", 3)
    drawn = Counter(rule(stream) for _ in range(DRAWS))
    assert chisquare([drawn[r] for r in (1, 2, 3)], [1e5 * 5 / 9, 1e5 * 3 / 9, 1e5 * 1 / 9]).pvalue > 1e-4
    assert {switch_counts("fixed", 7)(stream) for _ in range(100)} == {7}


def test_after_stagnation_the_number_of_switches_follows_a_power_law() -> None:
    stream, rule = Uniforms(np.random.default_rng(2)), heavy_tailed(12)
    drawn = Counter(rule(stream) for _ in range(DRAWS))
    weights = np.arange(1.0, 13.0) ** -2.5
    assert chisquare([drawn[r] for r in range(1, 13)], DRAWS * weights / weights.sum()).pvalue > 1e-4
    assert set(drawn) <= set(range(1, 13))
    assert heavy_tailed(1)(stream) == 1


def test_two_switches_are_two_single_switches_in_a_row() -> None:
    space = mixed_space(40)
    parent = (1, 1, 1, 1, 1, 1, 1)
    expected: defaultdict[Assignment, float] = defaultdict(float)
    for middle, p in single_switch_distribution(space, parent, "size").items():
        for end, q in single_switch_distribution(space, middle, "size").items():
            expected[end] += p * q
    mutate, stream = LevelSwitch(space), Uniforms(np.random.default_rng(3))
    drawn = Counter(mutate(parent, stream, 2) for _ in range(DRAWS))
    assert set(drawn) == set(expected)
    assert chisquare([drawn[k] for k in expected], [1e5 * p for p in expected.values()]).pvalue > 1e-4


@pytest.mark.parametrize("mutate", [LevelSwitch, Exchange, UnrestrictedSwitch])
def test_mutants_are_feasible(mutate: type[LevelSwitch | Exchange | UnrestrictedSwitch]) -> None:
    space = mixed_space()
    stream, rng = Uniforms(np.random.default_rng(4)), np.random.default_rng(4)
    made = 0
    for _ in range(3000):
        child = mutate(space)(space.sample(rng), stream, 1 + stream.below(3))
        if child is not None:
            made += 1
            assert space.feasible(child)
    assert made > 1000


def test_switches_inside_groups_keep_each_groups_cost_and_exchanges_do_not() -> None:
    space = mixed_space()
    parent = (1, 1, 1, 1, 1, 1, 0)
    stream = Uniforms(np.random.default_rng(5))

    def share(levels: Assignment) -> int:
        return sum(levels[:4])

    inside = {share(c) for _ in range(500) if (c := LevelSwitch(space)(parent, stream, 2)) is not None}
    across = {share(c) for _ in range(500) if (c := Exchange(space)(parent, stream, 2)) is not None}
    assert inside == {share(parent)}
    assert len(across) > 2


def test_the_unrestricted_switch_spends_most_of_what_it_frees() -> None:
    space = mixed_space()
    parent = space.uniform()
    stream = Uniforms(np.random.default_rng(6))
    for _ in range(2000):
        child = UnrestrictedSwitch(space)(parent, stream, 1)
        if child is None:
            continue
        added = sum(s for s, a, b in zip(SIZES, parent, child, strict=True) if b > a)
        removed = sum(s * (a - b) for s, a, b in zip(SIZES, parent, child, strict=True) if b < a)
        assert added >= 0.8 * removed
        assert sum(abs(a - b) for a, b in zip(parent, child, strict=True)) <= 10


@pytest.mark.parametrize("mutate", [LevelSwitch, Exchange, UnrestrictedSwitch])
def test_where_no_unit_may_change_there_is_no_offspring(
    mutate: type[LevelSwitch | Exchange | UnrestrictedSwitch],
) -> None:
    space = CompressionSpace([Unit("a", (1, 2), fixed=0), Unit("b", (1, 2), fixed=1)], 3)
    assert mutate(space)((0, 1), Uniforms(np.random.default_rng(0)), 1) is None
