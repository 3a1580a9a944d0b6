"""Fronts over a range of budgets: loss against cost, and the loss at five budgets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evo_hpo.record.fronts import Measure, loss_keys, measures, picked, points_of
from evo_hpo.record.problem_record import ProblemRecord
from evo_hpo.report.curves import Band
from evo_hpo.report.page import Sheet
from evo_hpo.report.results import Results
from evo_hpo.report.search_run import SearchRun
from evo_hpo.report.statistics import FEW, compare_pairs, spread
from evo_hpo.report.style import FAINT, INK, clean, figure, line_styles, literal
from evo_hpo.report.tables import figure_text, interval_text
from evo_hpo.space.ranges import foot, marks

Floats = npt.NDArray[np.float64]
BUDGETS = 5
POINTS = 400
LABEL = 0.13  # of the axis, that the label of a level takes; nearer ones stand on two lines


def _scale(problem: ProblemRecord) -> tuple[float, str]:
    """What a unit of cost is on the axis, and what the axis is called."""
    if problem.space.resources[0] == "bytes":
        return 1e6, "MB of the layers that are searched"
    return float(problem.space.total_size), problem.average_name


def _named(problem: ProblemRecord, key: str) -> str:
    """What a loss is called."""
    text = problem.texts[loss_keys(problem).index(key)] if problem.texts else ""
    kind = "KL" if problem.is_language_model else "loss"
    unit = " (nats/token)" if problem.is_language_model else ""
    return (f"{kind} on {text}" if text else f"held-out {kind}") + unit


def _ended(results: Results, problem: str, label: str) -> list[SearchRun]:
    return [r for r in results.of(problem, label) if r.checkpoints and r.checkpoints[-1].front]


def _given(run: SearchRun, key: str, budget: float) -> float:
    """Held-out loss of what a search's front gives at a budget; inf where it has nothing, or that failed."""
    point = picked(run.checkpoints[-1].front, budget)
    loss = point.held_out.get(key, math.nan) if point else math.nan
    return math.inf if math.isnan(loss) else loss


def _attained(run: SearchRun, key: str, x: Floats) -> Floats:
    """Least held-out loss of a search's front within each cost; inf where it has nothing."""
    points = [(cost, loss) for cost, loss in points_of(run.checkpoints[-1].front, key) if not math.isnan(loss)]
    costs = np.array([cost for cost, _ in points], dtype=float)
    least = np.minimum.accumulate([math.inf, *(loss for _, loss in points)])
    return np.asarray(least[np.searchsorted(costs, x, side="right")])


def attained(results: Results, problem: str, label: str, key: str) -> Band:
    """The median attainment surface of a searcher over its seeds, with its band as in anytime curves.

    ``x`` is cost; what half of the seeds do not reach is infinite. Its mean is what searches are compared by.
    """
    space = results.problems[problem].space
    x = np.linspace(foot(space), space.budget, POINTS)
    values = np.array([_attained(run, key, x) for run in _ended(results, problem, label)])
    if not len(values):
        return Band(x[:0], x[:0], x[:0], x[:0], "none", 0)
    middle = np.median(values, axis=0)
    if len(values) < FEW:
        return Band(x, middle, values.min(axis=0), values.max(axis=0), "range", len(values))
    picks = np.random.default_rng(0).integers(len(values), size=(1000, len(values)))
    medians = np.median(values[picks], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975], axis=0, method="nearest")
    return Band(x, middle, low, high, "95 % bootstrap", len(values))


def front_figure(results: Results, problem: str) -> Figure:
    """Held-out loss against cost: each searcher's median front with its band, uniform compression, the dense model."""
    info = results.problems[problem]
    keys = loss_keys(info)
    drawn, parts = figure(9.5, 4.8 if len(keys) == 1 else 4.2 * len(keys), nrows=len(keys), sharex=True, squeeze=False)
    for axes, key in zip(parts.flat, keys, strict=True):
        _draw(axes, results, problem, key)
    parts.flat[-1].set_xlabel(literal(_scale(info)[1]), color=INK)
    title = f"{literal(problem)}  ·  fronts, median over seeds  ·  lower is better"
    parts.flat[0].set_title(title, loc="left", fontsize=10, color=INK, pad=28)
    return drawn


def _draw(axes: Axes, results: Results, problem: str, key: str) -> None:
    """The fronts on one text."""
    info, styles = results.problems[problem], line_styles(results)
    unit = _scale(info)[0]
    clean(axes)
    if info.is_language_model:
        axes.set_yscale("log")
    means = {label: _mean(results, problem, label, key) for label in results.labels}
    for label in sorted(results.labels, key=lambda label: _order(means[label])):
        band = attained(results, problem, label, key)
        if not band.count:
            continue
        known = np.isfinite(band.middle)
        x, style = band.x[known] / unit, styles[label]
        name = f"{literal(label)}  {figure_text(means[label])}"
        axes.step(
            x, band.middle[known], where="post", color=style.colour, linestyle=style.dash, linewidth=1.7, label=name
        )
        if band.count > 1:
            high = np.where(np.isfinite(band.high[known]), band.high[known], band.middle[known])
            axes.fill_between(x, band.low[known], high, step="post", color=style.colour, alpha=0.16, linewidth=0)
    before, line = -math.inf, 0
    for name, cost in sorted(_levels(info), key=lambda level: level[1]):
        axes.axvline(cost / unit, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        line = 1 - line if cost - before < LABEL * (info.space.budget - foot(info.space)) else 0
        before = cost
        axes.annotate(
            f"all {literal(name)}", (cost / unit, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3 + 11 * line),
            textcoords="offset points", ha="center", fontsize=8, color=FAINT,
        )  # fmt: skip
    dense = info.reference.get(key)
    if dense is not None and dense > 0:
        axes.axhline(dense, color=FAINT, linewidth=1.2)
    if dense is not None:
        axes.annotate(
            f"dense model: {figure_text(dense)}", (0.01, 0.02), xycoords="axes fraction", fontsize=8.5, color=INK
        )
    if info.optima and key == "loss" and not info.instances:
        cost, loss = np.array(info.optima).T
        axes.step(cost / unit, loss, where="post", color=INK, linewidth=0.9, label="best front", zorder=1)
    axes.set_xlim(foot(info.space) / unit, info.space.budget / unit)
    axes.set_ylabel(literal(_named(info, key)), color=INK)
    axes.legend(
        title="mean over all budgets,\nmedian of the seeds", loc="center left", bbox_to_anchor=(1.0, 0.5),
        frameon=False, fontsize=9, title_fontsize=9,
    )  # fmt: skip


def _levels(problem: ProblemRecord) -> Iterator[tuple[str, int]]:
    """Each level that all units have, and what it costs everywhere, where that is within the range."""
    space = problem.space
    for name in dict.fromkeys(name for unit in space.units for name in unit.levels):
        if all(name in unit.levels for unit in space.units):
            cost = space.cost([unit.levels.index(name) for unit in space.units])
            if foot(space) <= cost <= space.budget:
                yield name, cost


def _order(value: float) -> tuple[bool, float]:
    """Sorts least first, and last what is not known."""
    return math.isnan(value), value


def _mean(results: Results, problem: str, label: str, key: str) -> float:
    """Median over the seeds of the mean loss over all budgets."""
    runs = [r for r in results.of(problem, label) if r.checkpoints]
    return spread([r.checkpoints[-1].held_out.get(key, math.nan) for r in runs]).estimate


# ---------------------------------------------------------------------- tables


def front_sheets(results: Results, problem: str) -> tuple[Sheet, ...]:
    """For each held-out text: hypervolume, and the loss at five budgets."""
    info = results.problems[problem]
    if not info.space.ranged or info.instances:
        return ()
    return tuple(_sheet(results, problem, key, measure) for key, measure in _measures(results, problem).items())


def _measures(results: Results, problem: str) -> dict[str, Measure]:
    return measures(results.problems[problem], results.of(problem))


def _at_budgets(results: Results, problem: str, key: str) -> list[tuple[int, dict[str, Floats]]]:
    """Budget -> searcher -> held-out loss, by seed, of what its front gives there.

    inf where a search has nothing there, NaN where there is no front yet; searchers that have nothing at all are left
    out.
    """
    found = []
    seeds = results.seeds(problem)
    for budget in marks(results.problems[problem].space, BUDGETS - 1):
        columns = {}
        for label in results.labels:
            runs = results.by_seed(problem, label)
            ended = {seed: run for seed, run in runs.items() if run.checkpoints and run.checkpoints[-1].front}
            values = np.array([_given(ended[seed], key, budget) if seed in ended else math.nan for seed in seeds])
            if np.isfinite(values).any():
                columns[label] = values
        found.append((budget, columns))
    return found


def _sheet(results: Results, problem: str, key: str, measure: Measure) -> Sheet:
    info = results.problems[problem]
    unit, axis = _scale(info)
    means = {label: _mean(results, problem, label, key) for label in results.labels}
    labels = sorted(results.labels, key=lambda label: _order(means[label]))
    at_budgets = _at_budgets(results, problem, key)
    worse = _worse(results, problem, at_budgets)
    rows = []
    for label in labels:
        runs = _ended(results, problem, label)
        areas = [measure.hypervolume(points_of(r.checkpoints[-1].front, key)) for r in runs]
        cells = []
        for budget, columns in at_budgets:
            cells.append(_cell(columns.get(label)) + (" *" if (budget, label) in worse else ""))
        points = spread([float(len(r.checkpoints[-1].front)) for r in runs])
        rows.append((label, interval_text(spread(areas)), figure_text(points.estimate), *cells))
    scale = "its logarithm" if measure.geometric else "loss"
    some = _SOME if any("seeds)" in cell for row in rows for cell in row[3:]) else ""
    note = (
        f"At each budget the dearest point that fits it{some}."
        f" Reference point: cost {measure.budget:,}, {_named(info, key)}"
        f" {figure_text(measure.loss)} (uniform compression where it loses most); hypervolume: share of the range times"
        f" {scale}, more is better. *: worse than the least of its column (Wilcoxon signed-rank, Holm over the table,"
        " p < 0.05)."
    )
    headers = ("searcher", "hypervolume", "points", *(f"at {budget / unit:.4g}" for budget, _ in at_budgets))
    return Sheet(f"Fronts: {_named(info, key)} at five budgets ({axis})", headers, tuple(rows), note, (0,))


_SOME = ", the median of the seeds that have one (those that have none count as worse in the tests)"


def _cell(values: Floats | None) -> str:
    """The median of the seeds that have a point, and how many that are where others have none."""
    if values is None:
        return "–"
    known, count = values[np.isfinite(values)], int((~np.isnan(values)).sum())
    return interval_text(spread(known)) + (f" ({len(known)} of {count} seeds)" if len(known) < count else "")


def _worse(results: Results, problem: str, at_budgets: Sequence[tuple[int, dict[str, Floats]]]) -> set[tuple[int, str]]:
    """(budget, searcher) of all that are shown to lose more than the one with the least median there.

    Of finished searches alone, as in all tests.
    """
    seeds = results.seeds(problem)
    ended = {k: {s for s, run in results.by_seed(problem, k).items() if run.finished} for k in results.labels}
    again = {label: np.array(results.repeated(problem, label), dtype=bool) for label in results.labels}
    columns, repeated = dict[str, Floats](), dict[str, npt.NDArray[np.bool_]]()
    pairs: list[tuple[str, str]] = []
    for budget, shown in at_budgets:
        found = {k: np.where([s in ended[k] for s in seeds], values, math.nan) for k, values in shown.items()}
        found = {label: values for label, values in found.items() if np.isfinite(values).any()}
        medians = {label: spread(values).estimate for label, values in found.items()}
        best = min(medians, key=lambda label: medians[label], default="")
        columns |= {f"{budget} {label}": values for label, values in found.items()}
        repeated |= {f"{budget} {label}": again[label] for label in found}
        pairs += [(f"{budget} {best}", f"{budget} {label}") for label in found if label != best]
    tests = compare_pairs(columns, pairs, repeated=repeated) if pairs else []
    claimed = {t.b for t in tests if t.claim == "better"}
    return {(budget, label) for budget, shown in at_budgets for label in shown if f"{budget} {label}" in claimed}


def write_fronts(results: Results, problem: str, target: Path, suffix: str = "") -> None:
    """``fronts.csv``: every point of every search; ``attainment.csv``: what shares of the seeds reach at each cost."""
    info = results.problems[problem]
    points, surfaces = list[dict[str, Any]](), list[dict[str, Any]]()
    for label in results.labels:
        runs = _ended(results, problem, label)
        for run in runs:
            own = {"searcher": label, "seed": run.seed, "id": run.id}
            for p in run.checkpoints[-1].front:
                average = info.space.average(p.levels)
                points.append({**own, "cost": p.cost, "average": average, "calibration": p.loss, **p.held_out})
        for key in loss_keys(info):
            sets = [(i, c, x) for i, r in enumerate(runs) for c, x in points_of(r.checkpoints[-1].front, key)]
            known = np.array([row for row in sets if math.isfinite(row[2])])
            for cost, loss, share in moocore.eaf(known[:, 1:], known[:, 0].astype(int)) if len(known) else ():
                surfaces.append({"searcher": label, "text": key, "percent": share, "cost": int(cost), "loss": loss})
    if points:
        pd.DataFrame(points).to_csv(target / f"fronts{suffix}.csv", index=False)
        pd.DataFrame(surfaces).to_csv(target / f"attainment{suffix}.csv", index=False)
