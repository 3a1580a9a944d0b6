"""Counting, enumerating and sampling agree with listing everything, and with closed forms where that is impossible."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from scipy.stats import chisquare

from evo_hpo.errors import InfeasibleError
from evo_hpo.space.compression_space import CompressionSpace, Unit
from tests.spaces import all_feasible, spaces


@settings(max_examples=80)
@given(spaces())
def test_count_and_enumerate_agree_with_listing_everything(space: CompressionSpace) -> None:
    expected = all_feasible(space)
    assert space.count() == len(expected)
    assert list(space.enumerate()) == expected  # lexicographic, each once


@settings(max_examples=80)
@given(spaces())
def test_every_sample_is_feasible(space: CompressionSpace) -> None:
    rng = np.random.default_rng(0)
    assert all(space.feasible(space.sample(rng)) for _ in range(10))


@pytest.mark.parametrize(("n", "k"), [(16, 6), (20, 8), (60, 20), (210, 105)])
def test_dropping_k_of_n_is_a_binomial_coefficient(n: int, k: int) -> None:
    space = CompressionSpace([Unit(f"m{i}", (0, 1)) for i in range(n)], n - k, floor=n - k)
    assert space.count() == math.comb(n, k)


def test_210_units_of_5_levels_are_counted_exactly() -> None:
    """Against the same coefficient by polynomial multiplication in Python integers."""
    space = CompressionSpace([Unit(f"m{i}", (2, 3, 4, 5, 6)) for i in range(210)], 630)
    coefficients = [1]
    for _ in range(210):
        longer = [0] * (len(coefficients) + 4)
        for at, ways in enumerate(coefficients):
            for step in range(5):
                longer[at + step] += ways
        coefficients = longer
    assert space.count() == sum(coefficients[: 630 - 420 + 1])


def test_two_resources_are_counted_in_a_large_space() -> None:
    """30 units dropped or kept at one of two sizes: at most 10 kept, at most 15 in size."""
    space = CompressionSpace([Unit(f"m{i}", ((0, 0), (1, 1), (2, 1))) for i in range(30)], (15, 10))
    ways = sum(
        math.comb(30, kept) * math.comb(kept, large)
        for kept in range(11)
        for large in range(kept + 1)
        if kept + large <= 15
    )
    assert space.count() == ways


def test_two_resources_are_counted_where_everything_could_be_listed_only_in_part() -> None:
    space = CompressionSpace([Unit(f"m{i}", ((1, 0), (3, 1), (4, 2))) for i in range(9)], (24, 9), floor=(15, 0))
    assert space.count() == len(all_feasible(space))


@pytest.mark.parametrize(
    "space",
    [
        CompressionSpace([Unit(f"m{i}", (0, 1)) for i in range(7)], 4, floor=4),
        CompressionSpace([Unit(f"m{i}", tuple(s * k for k in (2, 3, 4))) for i, s in enumerate((1, 3, 1, 8))], 40),
        CompressionSpace([Unit(f"m{i}", ((1, 0), (2, 1), (5, 1))) for i in range(4)], (9, 2)),
    ],
    ids=["exact cost", "unequal sizes", "two resources"],
)
def test_samples_are_uniform_over_the_feasible_assignments(space: CompressionSpace) -> None:
    rng = np.random.default_rng(1)
    drawn = Counter(space.sample(rng) for _ in range(60 * space.count()))
    assert chisquare([drawn[a] for a in space.enumerate()]).pvalue > 1e-3


def test_costs_too_fine_for_the_table_still_give_feasible_samples() -> None:
    rng = np.random.default_rng(2)
    units = [Unit(f"m{i}", tuple(int(c) for c in np.cumsum(rng.integers(10**9, 10**10, 4)))) for i in range(40)]
    space = CompressionSpace(units, sum(u.costs[1] for u in units))  # type: ignore[misc]
    drawn = [space.sample(rng) for _ in range(20)]
    assert all(map(space.feasible, drawn))
    assert len(set(drawn)) == 20


def test_a_budget_between_two_costs_that_nothing_meets_is_an_error() -> None:
    space = CompressionSpace([Unit(f"m{i}", (0, 10)) for i in range(3)], 15, floor=12)
    assert space.count() == 0
    assert list(space.enumerate()) == []
    with pytest.raises(InfeasibleError, match="floor and budget"):
        space.sample(np.random.default_rng(0))


def test_large_spaces_near_their_dearest_assignment_are_sampled() -> None:
    """3000 units, 300 of 6000 steps unspent: what the budget would allow elsewhere is 10^600 times as much."""
    space = CompressionSpace([Unit(f"m{i}", (2, 3, 4)) for i in range(3000)], 11_700, floor=11_700)
    levels = np.array(space.sample(np.random.default_rng(0)))
    assert space.feasible(levels.tolist())
    assert 0 < (levels == 0).sum() < (levels == 1).sum() < (levels == 2).sum()


def test_a_small_resource_beside_a_fine_one_stays_exact() -> None:
    rng = np.random.default_rng(0)
    fine = [tuple(sorted(rng.integers(0, 40_000, 3).tolist())) for _ in range(100)]
    one = CompressionSpace([Unit(f"u{i}", c) for i, c in enumerate(fine)], 1_500_000)
    two = CompressionSpace(
        [Unit(f"u{i}", tuple((c, int(k > 0)) for k, c in enumerate(costs))) for i, costs in enumerate(fine)],
        (1_500_000, 100),
    )
    slack = [np.mean([space.slack(space.sample(rng)) for _ in range(200)]) for space in (one, two)]
    assert slack[1] < slack[0] + 100 * 1_500_000 / (60_000_000 / 101 / 101)
