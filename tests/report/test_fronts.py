"""Fronts in the report: tables, pictures, CSV files, on one problem and on instances."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evo_hpo import Budget
from evo_hpo.record.fronts import measures, picked, points_of
from evo_hpo.report.fronts import attained, front_figure, front_sheets
from evo_hpo.report.report import write_report
from evo_hpo.report.results import Results
from evo_hpo.report.tables import figure_text
from evo_hpo.space.compression_space import CompressionSpace
from evo_hpo.space.ranges import marks, spanning
from tests.report.synthetic import StandIn, model_space, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uniform and two searchers over a range of bits on a stand-in with a dense model, six seeds."""
    single = model_space(3)
    space = spanning(*(CompressionSpace.from_average(single.units, bits, resources=("bits",)) for bits in (2.2, 3.8)))
    searchers = [
        ("uniform", "uniform", {}),
        ("random", "random", {}),
        ("evopress_front", "evopress_front", {"budgets": 5}),
    ]
    return write_folder(
        tmp_path_factory.mktemp("fronts"), [StandIn(space)], searchers, range(6), Budget(tokens=64 * 60)
    )


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return Results.load(folder)


def test_what_is_compared_is_the_mean_over_all_budgets(results: Results) -> None:
    record = results.recorded.problems["stand-in"]
    measure = measures(record, results.of("stand-in"))["loss"]
    assert measure.geometric, "it has a perplexity"
    for run in results.runs:
        assert run.loss == pytest.approx(measure.mean(points_of(run.checkpoints[-1].front, "loss")))
    assert results.problems["stand-in"].loss_name == "mean KL (nats/token, geometric)"
    uniform = results.uniform("stand-in")
    assert uniform is not None
    losses = [p.held_out["loss"] for p in uniform.checkpoints[-1].front]
    assert min(losses) < uniform.loss < max(losses)


def test_an_attainment_surface_is_the_median_of_what_the_seeds_reach_within_each_cost(results: Results) -> None:
    band = attained(results, "stand-in", "random", "loss")
    runs = results.of("stand-in", "random")
    assert (band.count, len(runs)) == (6, 6)
    for at in (0, 57, 200, 399):
        reached = [
            min([p.held_out["loss"] for p in run.checkpoints[-1].front if p.cost <= band.x[at]], default=np.inf)
            for run in runs
        ]
        assert band.middle[at] == np.median(reached)
        assert band.low[at] <= band.middle[at] <= band.high[at]


def test_the_table_has_hypervolumes_and_losses_at_five_budgets(results: Results) -> None:
    (sheet,) = front_sheets(results, "stand-in")
    space = results.problems["stand-in"].space
    assert sheet.headers[3:] == tuple(f"at {mark / space.total_size:.4g}" for mark in marks(space, 4))
    assert [row[0] for row in sheet.rows] == sorted(
        results.labels, key=lambda k: float(np.median([r.loss for r in results.of("stand-in", k)]))
    )
    uniform = next(row for row in sheet.rows if row[0] == "uniform")
    run = results.uniform("stand-in")
    assert run is not None
    point = picked(run.checkpoints[-1].front, marks(space, 4)[2])
    assert point is not None
    assert uniform[5].removesuffix(" *") == figure_text(point.held_out["loss"])
    assert "Reference point: cost" in sheet.note
    assert "uniform compression where it loses most" in sheet.note


def test_the_report_draws_the_front_and_writes_its_points(folder: Path, results: Results) -> None:
    page = write_report(results)
    assert (page.parent / "front.png").stat().st_size > 10_000
    text = page.read_text()
    assert "Loss against cost" in text
    assert "at five budgets (bits a weight)" in text
    points = pd.read_csv(page.parent / "fronts.csv")
    assert len(points) == sum(len(r.checkpoints[-1].front) for r in results.runs)
    surface = pd.read_csv(page.parent / "attainment.csv")
    half = surface[(surface.searcher == "random") & (surface.percent == 50)]
    band = attained(results, "stand-in", "random", "loss")
    for cost, loss in zip(half.cost, half.loss, strict=True):
        reached = [
            min([p.held_out["loss"] for p in run.checkpoints[-1].front if p.cost <= cost], default=np.inf)
            for run in results.of("stand-in", "random")
        ]
        assert sum(x <= loss + 1e-12 for x in reached) >= 3
    assert band.count == 6


def test_the_picture_has_every_searcher_whole_levels_and_the_dense_model(results: Results) -> None:
    figure = front_figure(results, "stand-in")
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    words = [text.get_text() for text in axes.texts]
    assert {"all 3"} <= set(words)
    assert any(re.fullmatch(r"dense model: 0", word) for word in words)
    legend = axes.get_legend()
    assert legend is not None
    named = [text.get_text().rpartition("  ")[0] for text in legend.get_texts()]
    assert sorted(named) == sorted(results.labels)
