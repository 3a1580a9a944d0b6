"""Writes everything that a comparison's reader wants: tables, pictures, one HTML page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from evo_hpo.files import write_whole
from evo_hpo.record.comparison import distinct
from evo_hpo.report.curves import axes
from evo_hpo.report.fronts import front_figure, front_sheets, write_fronts
from evo_hpo.report.heat_maps import profiles_figure, winner_figure
from evo_hpo.report.lineage import lineage, lineage_figure
from evo_hpo.report.page import (
    Picture,
    Section,
    Sheet,
    lineage_sheet,
    medians_sheet,
    problem_sheets,
    render,
    standing_sheets,
)
from evo_hpo.report.plots import anytime_figure, cost_figure, ecdf_figure, shown_labels
from evo_hpo.report.rank_plots import rank_figure, wins_figure
from evo_hpo.report.results import Results
from evo_hpo.report.scoring_sheet import scoring_sheet
from evo_hpo.report.sensitivity_map import measured_best, search_figure
from evo_hpo.report.style import save
from evo_hpo.report.summary import Summary, summarise
from evo_hpo.report.tables import rows, write_tables
from evo_hpo.report.texts import gains_figure
from evo_hpo.search.budget import KINDS

Drawing = tuple[str, str, Figure, str]
"""File name without suffix, title, figure, caption."""


def write_report(comparison: Path | str | Results) -> Path:
    """Writes ``report`` in a comparison's folder from what its journals hold so far; returns the HTML page.

    Raises:
        PlanError: not a comparison's folder.
    """
    results = comparison if isinstance(comparison, Results) else Results.load(comparison)
    target = results.recorded.folder / "report"
    write_tables(results, target)
    _draw_sensitivities(results)
    keys = [key for key in results.problems if results.of(key)]
    by_text = {key: _by_text(results, key) for key in keys}
    summaries = {key: next(iter(of.values())) for key, of in by_text.items()}
    overall = summarise(results, keys) if len(keys) > 1 else next(iter(summaries.values()), None)
    _write_statistics(by_text, overall, target)
    sections = [_overall(results, summaries, overall, target)] if overall and len(keys) > 1 else []
    names = distinct({key: re.sub(r"[^A-Za-z0-9_.-]+", "-", key) for key in results.problems})
    anchors = distinct({key: "p-" + re.sub(r"[^A-Za-z0-9]+", "-", key) for key in results.problems})
    for key in keys:
        suffix = "" if len(keys) == 1 else f"-{names[key]}"
        sections.append(_section(results, key, by_text[key], target, suffix, anchors[key]))
    verdict = overall.verdict if overall else "No search has a result yet."
    return write_whole(target / "report.html", render(results, sections, verdict))


def _draw_sensitivities(results: Results) -> None:
    """One picture for each search that measured some, for its run in the tracker; a drawn one stays as it is."""
    for run in results.runs:
        path = results.recorded.sensitivities_picture(run.id)
        if run.probes and not path.exists():
            save(search_figure(results.problems[run.problem].space, run), path.with_suffix(""), formats=("png",))


def _by_text(results: Results, key: str) -> dict[str, Summary]:
    """Statistics of one problem on each of its held-out texts, the one that names the winner first."""
    texts = results.problems[key].texts or ("",)
    return {texts[0]: summarise(results, [key])} | {t: summarise(results.on(key, t), [key]) for t in texts[1:]}


def _write_statistics(by_text: dict[str, dict[str, Summary]], overall: Summary | None, target: Path) -> None:
    frames = [
        summary.frame().assign(problem=key, text=text)
        for key, of in by_text.items()
        for text, summary in of.items()
        if summary.standings
    ]
    if overall is not None and len(by_text) > 1 and overall.standings:
        frames.append(overall.frame().assign(problem="all"))
    if frames:
        pd.concat(frames, ignore_index=True).to_csv(target / "statistics.csv", index=False)


def _overall(results: Results, summaries: dict[str, Summary], summary: Summary, target: Path) -> Section:
    medians = medians_sheet(results, summaries, [s.label for s in summary.standings])
    return Section(
        "all", "All problems together", "Every problem counts in gaps: 0 is its best known loss, 100 uniform.",
        "", (*standing_sheets(summary), medians), _saved(_ranks(results, summary, ""), target),
    )  # fmt: skip


def _section(
    results: Results, key: str, by_text: dict[str, Summary], target: Path, suffix: str, anchor: str
) -> Section:
    """One problem; ``suffix`` ends the names of its files, and is empty where there is one problem."""
    info, (summary, *_) = results.problems[key], by_text.values()
    if info.space.ranged:
        write_fronts(results, key, target, suffix)
    more = (*_elsewhere(by_text), lineage_sheet(results, key), scoring_sheet(results, key))
    return Section(
        anchor=anchor,
        title=key,
        text=" · ".join(info.lines),
        verdict=summary.verdict if suffix else "",
        sheets=(*problem_sheets(results, key), *front_sheets(results, key), *standing_sheets(summary)),
        pictures=_saved(_drawings(results, key, summary, suffix), target),
        more=tuple(sheet for sheet in more if sheet),
    )


def _elsewhere(by_text: dict[str, Summary]) -> Iterator[Sheet]:
    """The tests on every held-out text after the first."""
    for text, summary in list(by_text.items())[1:]:
        for sheet in standing_sheets(summary):
            yield replace(sheet, title=f"On {text}: {sheet.title[:1].lower()}{sheet.title[1:]}", folded=True)


def _saved(drawings: Iterator[Drawing], target: Path) -> tuple[Picture, ...]:
    """Saves each figure as it comes, so that only one is in memory."""
    return tuple(Picture(title, save(drawn, target / name)[0], caption) for name, title, drawn, caption in drawings)


def _ranks(results: Results, summary: Summary, suffix: str) -> Iterator[Drawing]:
    if len(summary.standings) < 2:
        return
    yield (
        f"ranks{suffix}",
        "Average ranks",
        rank_figure(summary),
        "1 is best. An orange bar joins searchers whose ranks the Nemenyi test cannot tell apart (5 %).",
    )
    if suffix:  # of several problems: who beats whom is shown for all of them together
        return
    yield (
        f"wins{suffix}",
        "Who beats whom",
        wins_figure(results, summary),
        "Share of common (problem, seed) pairs in which the row is below (better than) the column; ties count half.",
    )


def _drawings(results: Results, key: str, summary: Summary, suffix: str) -> Iterator[Drawing]:
    """All pictures of one problem, in reading order."""
    info = results.problems[key]
    if info.space.ranged and not info.instances:
        caption = (
            "At every budget the least held-out loss of what a search offers within it, whose mean the searches are"
            " compared by: the median over a searcher's seeds with its band. evo-hpo pick takes the dearest that fits."
        )
        yield f"front{suffix}", "Loss against cost", front_figure(results, key), caption
    for axis in axes(results, key):
        name = "anytime-seconds" if axis == "seconds" else "anytime"
        caption = f"Held-out loss of the incumbent against {KINDS[axis]}; lower is better."
        yield f"{name}{suffix}", f"Against {KINDS[axis]}", anytime_figure(results, key, axis), caption
    if len(info.texts) > 1 and any(not math.isnan(r.gain.estimate) for r in rows(results, key)):
        caption = "Median gain over uniform on each held-out text: where marks lie apart, one kind of text flatters."
        yield f"texts{suffix}", "On each held-out text", gains_figure(results, key), caption
    yield from _ranks(results, summary, suffix)
    if len(results.labels) > 1:
        caption = "Share of (seed, target) pairs reached; 51 targets from uniform's loss to the best known."
        yield f"ecdf{suffix}", "Targets reached", ecdf_figure(results, key), caption
    winner = results.winner(key)
    if winner is None:
        return
    caption = (
        "Of the single best search by held-out loss (the verdict compares medians over seeds). Level of every unit;"
        " orange is compressed more than the average, purple less."
    )
    yield f"profile{suffix}", "The winning profile", winner_figure(results, key), caption
    labels = shown_labels(results, key, 12)
    if len(labels) > 1:
        caption = "The best seed of each searcher, best searcher first."
        yield f"profiles{suffix}", "Profiles by searcher", profiles_figure(results, key, labels), caption
    space = results.problems[key].space
    if len(lineage(winner, space)) > 1:
        caption = "How that assignment came about: its ancestors, from the start to the end."
        yield f"lineage{suffix}", "Lineage of the winner", lineage_figure(winner, space), caption
    measured = measured_best(results, key)
    if measured is not None:
        caption = "What one backward pass predicts that each unit alone would cost, before any loss was asked."
        yield f"sensitivities{suffix}", "Which units matter", search_figure(space, measured), caption
    caption = "What each search spent, on gradients and by selection stage, and where its time went (means over seeds)."
    yield f"cost{suffix}", "Cost", cost_figure(results, key), caption
