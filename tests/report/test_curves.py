"""Anytime curves, areas, running times and attainment against integrals and counts made by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from evo_hpo.report.curves import (
    Curve,
    area,
    attainment,
    band,
    curve,
    expected_running_time,
    speed_up,
    targets,
    time_to,
)
from evo_hpo.report.findings import Findings
from evo_hpo.report.search_run import SearchRun
from evo_hpo.search.loop import Checkpoint
from evo_hpo.search.trial import Outcome, Trial
from tests.report.synthetic import in_memory

STEPS = Curve(np.array([10.0, 20.0, 60.0]), np.array([5.0, 3.0, 1.0]), 80.0)


def run(points: list[tuple[int, float]]) -> SearchRun:
    checkpoints = tuple(Checkpoint(t / 100, t, t // 10, t / 2, (0,), {"loss": loss}) for t, loss in points)
    return SearchRun("r", "p", "s", "s", 0, checkpoints=checkpoints)


def test_a_curve_is_a_step_function_of_its_checkpoints() -> None:
    assert STEPS.at([10, 15, 20, 59.9, 60, 1000]).tolist() == [5, 5, 3, 3, 1, 1]
    assert np.isnan(STEPS.at([0, 9.9])).all()
    found = curve(run([(10, 5.0), (20, 3.0), (20, 2.0), (30, math.nan)]), "tokens")
    assert (found.spent.tolist(), found.loss.tolist()) == ([10, 20], [5.0, 2.0])
    assert curve(run([(10, 5.0)]), "seconds").spent.tolist() == [5.0]


def test_area_is_the_integral() -> None:
    by_hand = (10 * 7 + 10 * 5 + 40 * 3 + 40 * 1) / 100
    assert area(STEPS, 100, before=7.0) == pytest.approx(by_hand)
    x = np.linspace(0, 100, 200_001)[:-1] + 1e-9
    values = np.where(x < 10, 7.0, STEPS.at(x))
    assert area(STEPS, 100, before=7.0) == pytest.approx(values.mean(), abs=1e-3)
    assert area(STEPS, 40, before=7.0) == pytest.approx((10 * 7 + 10 * 5 + 20 * 3) / 40)


def test_expected_running_time_counts_misses_in_full() -> None:
    miss = Curve(np.array([10.0]), np.array([4.0]), 90.0)
    assert (time_to(STEPS, 3.0), time_to(STEPS, 0.5)) == (20.0, math.inf)
    assert expected_running_time([STEPS, miss], 3.0) == pytest.approx((20 + 90) / 1)
    assert expected_running_time([STEPS, STEPS], 3.5) == 20.0
    assert expected_running_time([miss], 1.0) == math.inf


def test_expected_running_time_is_that_of_a_restarted_search() -> None:
    """A search that hits at 20 with probability 1/4 and else ends at 50 needs 3 x 50 + 20 on average."""
    hit, miss = Curve(np.array([20.0]), np.array([0.0]), 50.0), Curve(np.array([20.0]), np.array([9.0]), 50.0)
    rng = np.random.default_rng(0)
    totals = [50.0 * (rng.geometric(0.25) - 1) + 20 for _ in range(20_000)]
    assert expected_running_time([hit, miss, miss, miss], 1.0) == pytest.approx(np.mean(totals), rel=0.03)


def test_attainment_counts_search_and_target_pairs() -> None:
    other = Curve(np.array([30.0]), np.array([3.0]), 80.0)
    shares = attainment([STEPS, other], [4.0, 2.0], [0, 20, 30, 60])
    assert shares.tolist() == [0, 0.25, 0.5, 0.75]


def test_band_is_the_median_over_seeds() -> None:
    curves = [Curve(np.array([10.0 + s]), np.array([float(s)]), 50.0) for s in range(3)]
    found = band(curves)
    assert (found.x[0], found.x[-1], found.kind) == (12.0, 50.0, "range")
    assert (set(found.middle), set(found.low), set(found.high)) == ({1.0}, {0.0}, {2.0})
    assert band([]).count == 0
    assert band(curves * 2).kind == "95 % bootstrap"


def made(losses: dict[str, list[tuple[int, float]]]) -> Findings:
    base = in_memory({"uniform": [8.0]})
    runs = []
    for name, points in losses.items():
        found = run(points)
        paid = Outcome(Trial(0, (0,)), points[-1][1], tokens=points[-1][0])
        runs.append(SearchRun(name, "made", name, name, 0, outcomes=(paid,), checkpoints=found.checkpoints))
    return Findings("made", base.problems, (*base.runs, *runs))


def test_speed_up_is_spending_over_spending() -> None:
    comparison = made({"fast": [(20, 5.0), (40, 3.0), (100, 1.0)], "slow": [(50, 6.0), (100, 3.0)]})
    forth = speed_up(comparison, "made", "fast", "slow")
    back = speed_up(comparison, "made", "slow", "fast")
    assert forth is not None
    assert back is not None
    assert (forth.reached, back.reached) == (1, 0)
    assert forth.factor.estimate == pytest.approx(100 / 40)
    assert back.factor.estimate == 0.0


def test_targets_lie_between_uniform_and_the_best_known() -> None:
    comparison = made({"fast": [(20, 5.0), (100, 1.0)]})
    found = targets(comparison, "made", 7)
    assert found.tolist() == pytest.approx([7, 6, 5, 4, 3, 2, 1])


@pytest.mark.parametrize(
    ("best", "scale", "cut"), [(0.9, "log", True), (3.5, "linear", True), (0.9, "log", False), (3.5, "linear", False)]
)
def test_what_is_far_above_uniform_squeezes_nothing(best: float, scale: str, cut: bool) -> None:
    """Losses that uniform is a multiple of are drawn by factors; what is above the picture is marked."""
    found = in_memory({"uniform": [4.0], "good": [best, best, best], "bad": [8.0 if cut else 3.9] * 3})
    (axes,) = found.anytime().axes
    low, high = axes.get_ylim()
    assert axes.get_yscale() == scale
    assert 0 < low < best < 4.0 < high < 5.5
    legend = axes.get_legend()
    assert legend is not None
    entries = {text.get_text() for text in legend.get_texts()}
    assert ("bad  8.000  ↑" if cut else "bad  3.900") in entries
    assert ("above this picture" in legend.get_title().get_text()) == cut


@pytest.mark.parametrize("optimum", [None, 0.0, 0.01, 0.5, 5.0])
@pytest.mark.parametrize(
    "losses",
    [
        {"uniform": [4.0], "good": [0.0, 0.5, 0.6, 0.5, 0.5], "random": [9.0] * 5},
        {"uniform": [4.0], "good": [-0.1, 0.5, 0.6], "b": [0.0, 2.0, 3.0]},
        {"uniform": [math.inf], "good": [1.0] * 3, "bad": [50.0] * 3},
        {"uniform": [4.0], "good": [math.nan, 1.0, 1.0], "nothing": [math.nan] * 3},
        {"uniform": [4.0], "good": [1e-6] * 3, "b": [3.0] * 3},
        {"uniform": [4.0], "good": [1.0] * 3},
    ],
)
def test_a_picture_of_any_losses_has_limits_and_few_labels(
    losses: Mapping[str, Sequence[float]], optimum: float | None
) -> None:
    found = in_memory(dict(losses), optimum=optimum)
    (axes,) = found.anytime().axes
    axes.figure.canvas.draw()
    low, high = axes.get_ylim()
    assert math.isfinite(low)
    assert math.isfinite(high)
    ticks = [place for place in axes.get_yticks() if low <= place <= high]
    assert len(ticks) < 20
    legend = axes.get_legend()
    assert legend is not None
    if optimum is not None and any(text.get_text().startswith("optimum") for text in legend.get_texts()):
        assert low < optimum < high


def test_labels_of_large_losses_keep_their_zeros() -> None:
    (axes,) = in_memory({"uniform": [9000.0], "good": [900.0] * 3}).anytime().axes
    axes.figure.canvas.draw()
    labels = {text.get_text() for text in axes.get_yticklabels()}
    assert {"1,000", "2,000", "5,000"} <= labels
