"""Paired differences and races beside scipy's tests and simulated races between equals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from searchers.evopress.racing import Differences, Race

RNG = np.random.default_rng


@pytest.mark.parametrize("count", [2, 3, 8, 200])
@pytest.mark.parametrize("shift", [-0.3, 0.0, 0.3])
def test_mean_error_and_doubt_are_those_of_the_paired_t_test(count: int, shift: float) -> None:
    rng = RNG(count)
    incumbent = rng.normal(3.0, 1.0, count)
    candidate = incumbent + shift + 0.1 * rng.normal(size=count)
    found = Differences.between(candidate.tolist(), incumbent.tolist())
    expected = stats.ttest_rel(candidate, incumbent, alternative="less")
    assert found.doubt == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.mean / found.error == pytest.approx(expected.statistic, rel=1e-9)
    assert found.error == pytest.approx(stats.sem(candidate - incumbent), rel=1e-12)


def test_pieces_add_up_to_the_whole_in_any_order() -> None:
    a, b = RNG(0).normal(size=(2, 50))
    whole, total, backwards = Differences.between(a, b), Differences(), Differences()
    pieces = [Differences.between(x, y) for x, y in zip(np.split(a, [1, 8, 20]), np.split(b, [1, 8, 20]), strict=True)]
    for piece in pieces:
        total += piece
    for piece in reversed(pieces):
        backwards += piece
    for found in (total, backwards):
        assert found.count == 50
        assert found.mean == pytest.approx(whole.mean)
        assert found.doubt == pytest.approx(whole.doubt)


def test_a_single_sequence_tells_nothing_and_equal_losses_are_no_gain() -> None:
    assert Differences.between([1.0], [2.0]).doubt == 1.0
    assert Differences().doubt == 1.0
    assert Differences.between([1.0, 2.0], [1.0, 2.0]).doubt == 1.0
    assert Differences.between([1.0, 2.0], [1.5, 2.5]).doubt == 0.0


def _wins(race: Race, looks: tuple[int, ...], draws: np.ndarray) -> float:
    """Share of races that are won at one of the looks, by differences (races x sequences)."""
    zero = np.zeros(draws.shape[1])
    return float(np.mean([any(race.won(Differences.between(d[:n], zero[:n])) for n in looks) for d in draws]))


@pytest.mark.parametrize("level", [0.05, 0.16])
def test_of_equals_as_many_win_as_the_level_says_and_more_looks_raise_it_less_than_they_count(level: float) -> None:
    draws = RNG(1).normal(size=(3000, 32))
    margin = 3.5 * np.sqrt(level / 3000)
    one = _wins(Race(level), (8,), draws)
    assert one == pytest.approx(level, abs=margin)
    assert one < _wins(Race(level), (8, 16, 32), draws) < 3 * level


def test_of_equals_with_skewed_differences_not_many_more_win() -> None:
    draws = RNG(2).exponential(size=(3000, 32)) - 1.0
    assert _wins(Race(0.16), (32,), draws) < 0.22
    assert _wins(Race(0.16), (32,), -draws) < 0.22


def test_what_is_truly_better_wins_with_the_power_of_the_t_test() -> None:
    draws = RNG(3).normal(-0.5, 1.0, size=(2000, 32))
    critical = stats.t.ppf(0.05, 31)
    power = stats.nct.cdf(critical, 31, -0.5 * np.sqrt(32))
    assert _wins(Race(0.05), (32,), draws) == pytest.approx(power, abs=0.04)


def test_hopeless_is_what_would_not_win_if_the_rest_were_like_what_was_read() -> None:
    race = Race(0.05)
    for seed in range(300):
        rng = RNG(seed)
        found = Differences.between(rng.normal(-0.4, 1.0, 16), np.zeros(16))
        needed = stats.t.ppf(0.05, 63) * found.deviation / np.sqrt(64)
        assert race.hopeless(found, 64) == (found.mean >= needed)
        if race.won(found):
            assert not race.hopeless(found, 64)


def test_hopeless_too_is_what_is_no_better_or_was_read_to_the_end() -> None:
    race, better = Race(0.05), Differences.between([0.0, 0.1, 0.2], [0.3, 0.1, 0.2])
    assert race.hopeless(Differences.between([1.0], [0.9]), 64)
    assert not race.hopeless(Differences.between([0.9], [1.0]), 64)
    assert race.hopeless(Differences.between([0.9], [1.0]), 1)
    assert race.hopeless(better, 3)
    assert not race.hopeless(better, 300)
