"""What pictures hold, read from what is drawn, against figures by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from evo_hpo import CompressionSpace, Unit
from evo_hpo.report.curves import band, curve
from evo_hpo.report.findings import Findings
from evo_hpo.report.heat_maps import layout_of, level_values, profile_figure
from evo_hpo.report.lineage import lineage_figure
from evo_hpo.report.plots import anytime_figure, cost_figure, ecdf_figure
from evo_hpo.report.rank_plots import rank_figure, wins_figure
from evo_hpo.report.size_plot import size_figure
from evo_hpo.report.tables import rows
from evo_hpo.search.trial import Outcome, Trial
from tests.report.synthetic import in_memory, of_runs, one_run


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def line(axes: Axes, label: str) -> Line2D:
    """The line whose entry in the legend begins with a label."""
    return next(line for line in axes.get_lines() if str(line.get_label()).startswith(f"{label}  "))


def ends(axes: Axes, label: str) -> tuple[float, float]:
    """Where a line ends, and at which loss."""
    x, y = (np.asarray(values, dtype=float) for values in line(axes, label).get_data())
    return float(x[-1]), float(y[-1])


# ---------------------------------------------------------------------- curves


def of_searches(searches: Mapping[str, Sequence[tuple[list[float], int, bool]]]) -> Findings:
    """Label -> of each seed its losses, what it spent, and whether it has finished."""
    runs = [one_run("p", "uniform", 0, [1.0], spent=1, fixed=True)]
    for label, found in searches.items():
        runs += [one_run("p", label, s, x, spent=n, finished=done) for s, (x, n, done) in enumerate(found)]
    return of_runs(runs)


def test_a_curve_is_drawn_in_steps_and_says_what_its_band_is() -> None:
    few = of_searches({"a": [([0.9, 0.5], 100, True), ([0.7, 0.3], 100, True)]})
    (axes,) = anytime_figure(few, "p").axes
    drawn = line(axes, "a")
    assert drawn.get_drawstyle() == "steps-post"
    x, y = (np.asarray(values, dtype=float) for values in drawn.get_data())
    assert y[(x >= 50) & (x < 100)].tolist() == pytest.approx([0.8] * int(((x >= 50) & (x < 100)).sum()))
    assert ends(axes, "a") == pytest.approx((100, 0.4))
    assert axes.get_title(loc="left").endswith("median over 2 seeds, band: least to greatest")
    many = of_searches({"a": [([0.5 + 0.1 * s], 100, True) for s in range(5)]})
    title = anytime_figure(many, "p").axes[0].get_title(loc="left")
    assert title.endswith("median over 5 seeds, band: 95 % bootstrap interval of it")


def test_searches_that_go_on_are_drawn_as_far_as_they_are_and_those_that_stopped_early_to_the_end() -> None:
    found = of_searches(
        {
            "long": [([0.9, 0.4], 100, True)] * 2,
            "early": [([0.9, 0.6], 20, True)] * 2,
            "going": [([0.8, 0.75], 20, False), ([0.8, 0.7], 40, False)],
        }
    )
    (axes,) = anytime_figure(found, "p", "tokens").axes
    assert ends(axes, "long") == (100, 0.4)
    assert ends(axes, "early") == (100, 0.6)
    assert ends(axes, "going (so far)") == pytest.approx((20, 0.775))
    assert {"going (so far)  0.7750", "early  0.6000"} <= set(legend(axes))


def test_where_some_seeds_have_finished_the_curve_is_theirs() -> None:
    runs = [one_run("p", "c", 0, [0.9, 0.2]), *(one_run("p", "c", s, [0.8], spent=20, finished=False) for s in (1, 2))]
    found = band([curve(r, "tokens") for r in runs])
    assert (found.x[-1], found.middle[-1], found.count, found.finished) == (100, 0.2, 1, True)
    going = band([curve(r, "tokens") for r in runs[1:]])
    assert (going.x[-1], going.middle[-1], going.count, going.finished) == (20, 0.8, 2, False)


def test_targets_met_are_counted_over_searches_and_targets() -> None:
    """Targets from 1 (left out) to 0: after 50 tokens one of two searches is at 0.5, at the end at 0."""
    found = of_searches({"a": [([0.5, 0.0], 100, True), ([1.0, 1.0], 100, True)]})
    axes = ecdf_figure(found, "p").axes[0]
    drawn = line(axes, "a")
    x, y = (np.asarray(values, dtype=float) for values in drawn.get_data())
    by_hand = {20: 0.0, 60: sum(1 - k / 51 >= 0.5 for k in range(1, 52)) / 102, 100: 0.5}
    for at, share in by_hand.items():
        assert y[np.searchsorted(x, at, side="right") - 1] == pytest.approx(share)
    assert drawn.get_drawstyle() == "steps-post"
    assert legend(axes) == ["a  50%", "uniform  0%"]


# ---------------------------------------------------------------------- ranks, wins, cost


RANKED: dict[str, Sequence[float]] = {"a": [1.0, 1.0, 3.0, 1.0], "b": [2.0, 2.0, 1.0, 2.0], "c": [3.0, 3.0, 2.0, 3.0]}


def test_dots_stand_at_average_ranks() -> None:
    axes = rank_figure(in_memory(RANKED).summary()).axes[0]
    dots = [float(np.asarray(found.get_xdata())[0]) for found in axes.get_lines() if found.get_marker() == "o"]
    assert dots == [1.5, 1.75, 2.75]


def test_a_cell_is_the_share_of_pairs_in_which_the_row_is_below_the_column() -> None:
    found = in_memory(RANKED | {"b": [2.0, 2.0, 1.0, 1.0]})
    axes = wins_figure(found, found.summary()).axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    cells = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axes.texts}
    by_name = {(names[i], names[j]): text for (i, j), text in cells.items()}
    assert by_name["a", "b"] == "62%"
    assert by_name["b", "a"] == "38%"
    assert by_name["b", "c"] == "100%"
    assert by_name["a", "c"] == "75%"
    shares: Any = np.ma.filled(np.ma.asarray(axes.collections[0].get_array()), np.nan)
    assert shares[names.index("a"), names.index("c")] == 0.75


def test_seconds_of_model_and_searcher_are_told_apart() -> None:
    runs = [replace(one_run("p", "a", s, [0.5]), searcher_seconds=0.5 + s) for s in (0, 1)]
    right = cost_figure(of_runs(runs), "p").axes[1]
    model, own = right.containers
    assert [bar.get_width() for bar in model] == [3.0]
    assert [(bar.get_x(), bar.get_width()) for bar in own] == [(3.0, 1.0)]
    assert legend(right) == ["scoring (model)", "searcher itself"]


def test_failed_trials_are_counted() -> None:
    run = one_run("p", "a", 0, [0.5])
    failed = replace(run.outcomes[0], status="failed", loss=float("inf"))
    found = of_runs([replace(run, outcomes=(*run.outcomes, failed, failed))])
    assert (rows(found, "p")[0].failed, rows(found, "p")[0].trials) == (2, 3)
    assert found.frame()["failed"].tolist() == [2]


def test_a_lineage_has_each_step_at_what_was_spent() -> None:
    space = in_memory({"a": [1.0]}).problems["made"].space
    assert space.uniform() == (1, 0, 1, 0)
    chain = [((1, 1, 0, 0), None), ((1, 0, 1, 0), 0), ((0, 0, 1, 1), 1)]
    outcomes = tuple(Outcome(Trial(i, levels, parent=parent), 1.0, 10) for i, (levels, parent) in enumerate(chain))
    axes = lineage_figure(replace(one_run("made", "a", 0, [0.5]), outcomes=outcomes), space).axes[0]
    (steps,) = axes.get_lines()
    assert np.asarray(steps.get_data(), dtype=float).tolist() == [[10, 20, 30], [2, 0, 2]]
    (bars,) = axes.containers
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in bars] == [(20, 2), (30, 2)]


def test_files_lie_at_their_bytes_and_perplexities() -> None:
    sizes = {"original": (270e6, 12.0, 11.0, 13.5), "small": (60e6, 90.0, None, None)}
    found = [
        {"name": name, "bytes": size, "texts": {"docs": {"perplexity": {"mean": mean, "low": low, "high": high}}}}
        for name, (size, mean, low, high) in sizes.items()
    ]
    (axes,) = size_figure(found, ["docs"]).axes
    bars: Any = axes.containers
    points = [np.asarray(bar.lines[0].get_data(), dtype=float).ravel().tolist() for bar in bars]
    assert points == [[270, 12], [60, 90]]
    (error,) = bars[0].lines[2]
    assert error.get_segments()[0].tolist() == [[270, 11], [270, 13.5]]
    assert not bars[1].has_yerr
    assert axes.get_yscale() == "log"
    assert axes.get_title() == "docs"


# ---------------------------------------------------------------------- levels


def entries(figure: Figure) -> dict[str, tuple[float, ...]]:
    """Colour of each entry in the legend of levels."""
    found = next(axes.get_legend() for axes in figure.axes if axes.get_legend() is not None)
    assert found is not None
    handles: Any = found.legend_handles
    colours = [tuple(float(x) for x in handle.get_facecolor()[0]) for handle in handles]
    return dict(zip([text.get_text() for text in found.get_texts()], colours, strict=True))


def test_a_level_has_one_colour_where_units_have_different_ones() -> None:
    """By what it costs a weight: Q4_K is as much in a unit of three levels as in one of two."""
    costs = {"dropped": 0, "Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "kept": 8}
    levels = [("dropped", "Q2_K", "Q4_K"), ("dropped", "kept"), ("Q2_K", "Q3_K", "Q4_K", "kept"), ("Q4_K", "kept")]
    units = [
        Unit(f"model.layers.{i}.mlp", tuple(costs[name] * size for name in of), levels=of, size=size)
        for i, (of, size) in enumerate(zip(levels, (1, 2, 3, 1), strict=True))
    ]
    space = CompressionSpace(units, 40)
    assert level_values(space) == ([[float(costs[name]) for name in of] for of in levels], False)
    drawn = profile_figure(space, (1, 1, 0, 0))
    colours = entries(drawn)
    assert list(colours) == list(costs)
    assert len(set(colours.values())) == 5
    grid = layout_of(space, (1, 1, 0, 0))
    assert grid.mean == pytest.approx(space.average((1, 1, 0, 0)))
    shown = next(axes.collections[0] for axes in drawn.axes if axes.get_xlabel() == "decoder block")
    faces = shown.to_rgba(np.ma.filled(np.ma.asarray(shown.get_array()), 0).ravel())
    for face, name in zip(faces, ("Q2_K", "kept", "Q2_K", "Q4_K"), strict=True):
        assert tuple(face) == pytest.approx(colours[name])


def test_levels_that_all_units_have_keep_their_even_steps_and_equals_share_an_entry() -> None:
    same = CompressionSpace([Unit(f"u{i}", (0, 1, 9), levels=("dropped", "half", "kept")) for i in range(3)], 20)
    assert level_values(same) == ([[0, 0.5, 1]] * 3, False)
    units = [Unit("a", (0, 2), levels=("dropped", "Q2_K")), Unit("b", (0, 2), levels=("dropped", "2:4"))]
    assert list(entries(profile_figure(CompressionSpace(units, 4), (1, 1)))) == ["dropped", "Q2_K / 2:4"]


def test_a_model_whose_size_is_not_known_is_in_no_picture_of_sizes() -> None:
    figures = {"docs": {"perplexity": {"mean": 12.0, "low": None, "high": None}}}
    rows = [{"name": name, "bytes": size, "texts": figures} for name, size in (("a", 0), ("b", 60e6))]
    assert size_figure(rows, ["docs"]).axes[0].get_legend_handles_labels()[1] == ["b"]
    assert size_figure(rows[:1], ["docs"]).axes[0].get_legend_handles_labels()[1] == []
