"""Statistics against scipy, scikit-posthocs, statsmodels, closed forms and hand-made examples."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evo_hpo.report.statistics import (
    average_ranks,
    bootstrap,
    cliques,
    compare_pairs,
    critical_difference,
    friedman,
    holm,
    interquartile_mean,
    least_p,
    pairs_needed,
    rank_biserial,
    spread,
    superiority,
    wilcoxon,
    wins_ties_losses,
)


def sample(seed: int, size: int = 12) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.random.default_rng(seed).normal(size=size)


def means(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(np.mean(values, axis=axis))


def test_bootstrap_agrees_with_scipy() -> None:
    values = sample(1, 20)
    ours = bootstrap(values, resamples=40_000)
    theirs = stats.bootstrap(
        (values,), np.median, method="percentile", n_resamples=40_000, rng=np.random.default_rng(5)
    ).confidence_interval
    assert ours.estimate == np.median(values)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05)


def test_strata_keep_the_share_of_each_problem() -> None:
    values = [0.0] * 10 + [1.0] * 10
    strata = ["a"] * 10 + ["b"] * 10
    mean = bootstrap(values, means, strata=strata)
    assert (mean.low, mean.high) == (0.5, 0.5)
    assert bootstrap(values, means).high > 0.6


def test_few_values_show_their_range_and_many_a_bootstrap() -> None:
    assert spread([3.0]).kind == "value"
    assert (spread([3.0, 1.0, 2.0]).low, spread([3.0, 1.0, 2.0]).high) == (1.0, 3.0)
    assert spread([3.0, 1.0, 2.0]).kind == "range"
    assert spread(sample(0, 5)).kind == "95 % bootstrap"
    assert spread([]).count == 0
    assert spread([1.0, math.nan, 2.0]).count == 2
    assert spread([1.0, 2.0, 3.0, 4.0, math.inf]).high == math.inf


def test_interquartile_mean_by_hand() -> None:
    assert interquartile_mean([1, 2, 3, 4, 5, 6, 7, 100]) == 4.5
    assert interquartile_mean(np.array([[1.0, 2, 3, 40], [4, 5, 6, 70]])).tolist() == [2.5, 5.5]
    assert interquartile_mean([1.0, 3.0]) == 2.0


def test_wins_ties_losses_count_failures() -> None:
    assert wins_ties_losses([1, 2, 3, math.inf, math.inf], [2, 2, 1, 5, math.inf]) == (1, 2, 2)
    assert wins_ties_losses([1, math.nan], [2, 1]) == (1, 0, 0)


def test_holm_agrees_with_statsmodels_and_by_hand() -> None:
    from statsmodels.stats.multitest import multipletests

    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    many = np.random.default_rng(0).random(20) ** 3
    assert holm(many.tolist()) == pytest.approx(multipletests(many, method="holm")[1].tolist())


def test_wilcoxon_agrees_with_counting_all_signs() -> None:
    a, b = sample(3, 9), sample(4, 9) + 0.5
    d = a - b
    ranks = stats.rankdata(abs(d))
    signs = np.array(np.meshgrid(*[[0, 1]] * 9)).reshape(9, -1).T
    sums = signs @ ranks
    observed = ranks[d > 0].sum()
    extreme = np.abs(sums - ranks.sum() / 2) >= abs(observed - ranks.sum() / 2) - 1e-9
    assert wilcoxon(a, b) == pytest.approx(extreme.mean())


@pytest.mark.parametrize("seed", range(4))
def test_wilcoxon_with_ties_agrees_with_scipy_s_exact_permutation(seed: int) -> None:
    d = np.random.default_rng(seed).integers(-2, 4, size=9).astype(float)
    nonzero = d[d != 0]
    exact = stats.wilcoxon(nonzero, method=stats.PermutationMethod(n_resamples=1 << 13)).pvalue
    assert wilcoxon(d, 0 * d) == pytest.approx(exact)


def test_wilcoxon_with_ties_is_the_exact_permutation() -> None:
    d = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert wilcoxon(d, 0 * d) == pytest.approx(2 / 64)
    assert wilcoxon([1, 2], [1, 2]) == 1.0
    assert wilcoxon([1, 1, 1, 1, 1, 1], [math.inf] * 6) == pytest.approx(2 / 64)


@pytest.mark.parametrize("pairs", [3, 5, 6, 10])
def test_least_p_is_what_the_test_gives_when_all_pairs_agree(pairs: int) -> None:
    a = np.arange(1.0, pairs + 1)
    assert wilcoxon(-a, 0 * a) == pytest.approx(least_p(pairs))


def test_five_seeds_never_make_a_claim_and_ten_may() -> None:
    columns = {"a": np.arange(5.0), "b": np.arange(5.0) + np.linspace(1, 2, 5)}
    (test,) = compare_pairs(columns, [("a", "b")])
    assert test.p == 0.0625
    assert "too few seeds" in test.claim
    columns = {"a": np.arange(10.0), "b": np.arange(10.0) + np.linspace(1, 2, 10)}
    (test,) = compare_pairs(columns, [("a", "b")])
    assert (test.claim, test.wins, test.effect) == ("better", 10, 1.0)
    assert pairs_needed(1) == 6
    assert pairs_needed(4) == 8


def test_effect_sizes_by_hand() -> None:
    assert rank_biserial([1, 1, 5], [2, 3, 4]) == pytest.approx((1.5 + 3 - 1.5) / 6)
    assert rank_biserial([2.0], [2.0]) == 0.0
    assert superiority([1, 2], [2, 3]) == pytest.approx((1 + 1 + 0.5 + 1) / 4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=4, max_size=12), st.integers(0, 1000))
def test_superiority_is_the_mann_whitney_statistic(values: list[int], seed: int) -> None:
    other = np.random.default_rng(seed).integers(0, 6, 7)
    u = stats.mannwhitneyu(other, values).statistic
    assert superiority(values, other.tolist()) == pytest.approx(u / (len(values) * 7))


def test_ranks_friedman_and_critical_difference_agree_with_published_values() -> None:
    # q at 5 % divided by sqrt 2, from table 5(a) of Demsar (2006): 2.343 for 3 and 2.728 for 5 classifiers.
    for k, q in ((2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)):
        assert critical_difference(k, 14) == pytest.approx(q * math.sqrt(k * (k + 1) / (6 * 14)), abs=2e-3)
    table = np.random.default_rng(1).random((10, 4))
    assert average_ranks([[1, 2, 3], [2, 1, 1]]).tolist() == [2.0, 1.75, 2.25]
    ranks = average_ranks(table)
    chi = 12 * 10 / (4 * 5) * ((ranks**2).sum() - 4 * 25 / 4)  # Demsar (2006), section 3.2.2
    assert friedman(table) == pytest.approx(stats.chi2.sf(chi, 3))
    assert friedman([[1, 1, 1], [2, 2, 2]]) == 1.0
    assert math.isnan(friedman([[1, 2]]))


def test_cliques_are_what_the_nemenyi_test_cannot_tell_apart() -> None:
    posthocs = pytest.importorskip("scikit_posthocs")
    table = np.random.default_rng(2).random((15, 5)) + np.array([0, 0.1, 0.5, 0.6, 1.2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p = posthocs.posthoc_nemenyi_friedman(table).to_numpy()
    ranks = average_ranks(table)
    joined = {frozenset((a, b)) for group in cliques(ranks, critical_difference(5, 15)) for a in group for b in group}
    for a in range(5):
        for b in range(a):
            assert (frozenset((a, b)) in joined) == (p[a, b] >= 0.05)


def test_cliques_by_hand() -> None:
    assert cliques([1.0, 1.5, 3.0, 3.2], 1.0) == [(0, 1), (2, 3)]
    assert cliques([3.0, 1.0, 2.0], 1.5) == [(1, 2), (2, 0)]
    assert cliques([1.0, 5.0], 1.0) == []
