"""The HTML page of a comparison: one file, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from evo_hpo.report.lineage import lineage
from evo_hpo.report.results import Results
from evo_hpo.report.statistics import PairedTest
from evo_hpo.report.style import DPI
from evo_hpo.report.summary import GOALS, Standing, Summary
from evo_hpo.report.tables import Column, columns, figure_text, interval_note, interval_text, rows
from evo_hpo.report.texts import text_columns
from evo_hpo.search.budget import KINDS


@dataclass(frozen=True)
class Picture:
    """A picture beside the page, embedded into it."""

    title: str
    path: Path
    caption: str

    @property
    def data(self) -> str:
        """The PNG as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()

    @property
    def width(self) -> int:
        """How wide to show it, in CSS pixels: 100 an inch of the figure, so that text is alike in all pictures."""
        pixels = int.from_bytes(self.path.read_bytes()[16:20], "big")
        return round(pixels / DPI * 100)


@dataclass(frozen=True)
class Sheet:
    """A table of text; ``strong`` are the rows to stress."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    strong: tuple[int, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A problem, or all of them together: verdict, tables, pictures."""

    anchor: str
    title: str
    text: str
    verdict: str
    sheets: tuple[Sheet, ...]
    pictures: tuple[Picture, ...]
    more: tuple[Sheet, ...] = field(default=())


def problem_sheets(results: Results, problem: str) -> tuple[Sheet, ...]:
    """The table of results; of several held-out texts, then one with all of them side by side."""
    found = rows(results, problem)
    strong = tuple(i for i, r in enumerate(found) if r.kind != "dense")[:1]
    note, texts = interval_note(found), text_columns(results, problem)
    first = _sheet("Results on held-out data", columns(results, problem, found), note + FAIR, strong)
    return (first, *([_sheet("On each held-out text", texts, note + ELSEWHERE, strong)] if texts else []))


def _sheet(title: str, shown: Sequence[Column], note: str, strong: tuple[int, ...]) -> Sheet:
    body = tuple(zip(*(c.cells for c in shown), strict=True))
    return Sheet(title, tuple(c.title for c in shown), body, note, strong)


FAIR = (
    " Held-out figures are taken outside the budget; “model s” is scoring time, none for what had been scored"
    " before, “searcher s” the time inside the searcher itself; medians over seeds."
)


ELSEWHERE = (
    " The first text names the winner; “above” it is how much more the same assignment loses on the other. A gain on"
    " text of the calibration's kind that is not there on the other is flattery."
)


def standing_sheets(summary: Summary) -> tuple[Sheet, ...]:
    """Ranks and tests, and what the whole budget looked like."""
    if len(summary.standings) < 2:
        return ()
    sure = Sheet(
        "How sure is that?",
        ("searcher", "mean rank", "median", "interquartile mean", *_AGAINST_BEST),
        tuple(_ranked(s) for s in summary.standings),
        f"{summary.value}; {summary.pairs} (problem, seed) pairs that all of them finished. Wins, ties and losses of"
        f" the best (top row) against the row; difference: median of best minus row. {_TEST_NOTE} The best is chosen"
        " after seeing the results, which makes its p a little too small."
        f" Friedman test that all are alike: p {_p(summary.friedman, sign=True)}.",
        (0,),
    )
    tested = [s for s in summary.standings if s.versus_uniform is not None]
    uniform = Sheet(
        "Against uniform compression",
        ("searcher", "wins / ties / losses", "difference", "p (Holm)", "effect", "chance to be below", "so it is"),
        tuple((s.label, *_test(s.versus_uniform, chance=True)) for s in tested if s.versus_uniform),
        f"Difference: median of searcher minus uniform, negative is better. {_TEST_NOTE}",
    )
    sheets = (sure, uniform) if tested else (sure,)
    if len(summary.problems) > 1 or not any(s.area for s in summary.standings):
        return sheets
    unit = KINDS[summary.axis]
    goals = tuple(f"expected {summary.axis} to {'best known' if g == 0 else f'gap {g:g} %'}" for g in GOALS)
    budget = Sheet(
        "Over the whole budget",
        ("searcher", "mean loss over the budget", *goals, "best gets there × sooner"),
        tuple(_spent(s) for s in summary.standings),
        "Mean loss is the area under the anytime curve divided by the budget. Expected running time: everything spent"
        f" by all seeds ({unit}) divided by how many reached the target, “never” without one; a gap of 100 % is"
        " uniform, 0 % the best known loss. The last column: what this searcher spent, divided by what the best needed"
        " to reach this searcher's final loss (median over seeds; as fine as the checkpoints; 0 where it never did).",
        (0,),
    )
    return *sheets, budget


_AGAINST_BEST = ("best’s wins / ties / losses", "difference", "p (Holm)", "effect", "so the best is")
_TEST_NOTE = (
    "p: two-sided Wilcoxon signed-rank test, Holm-corrected over this table; effect: rank-biserial correlation, from 1"
    " (always better) to -1 (always worse)."
)


def _ranked(s: Standing) -> tuple[str, ...]:
    return (
        s.label,
        f"{s.rank:.2f}" if not math.isnan(s.rank) else "–",
        interval_text(s.median),
        interval_text(s.iqm),
        *(_test(s.versus_best) if s.versus_best else ("–",) * 5),
    )


def _test(test: PairedTest, *, chance: bool = False) -> tuple[str, ...]:
    return (
        f"{test.wins} / {test.ties} / {test.losses}",
        interval_text(test.difference, 3),
        _p(test.p_holm),
        f"{test.effect:+.2f}",
        *((f"{test.superiority:.0%}",) if chance else ()),
        test.claim.split(" for")[0],
    )


def _p(value: float, *, sign: bool = False) -> str:
    if math.isnan(value):
        return "not known" if sign else "–"
    return "< 0.0001" if value < 1e-4 else f"{'= ' if sign else ''}{value:.2g}"


def _spent(s: Standing) -> tuple[str, ...]:
    speed = "–"
    if s.speed_up is not None:
        f = s.speed_up.factor
        speed = f"{f.estimate:.2g}" + (f" [{f.low:.2g}, {f.high:.2g}]" if f.low != f.high else "")
        speed += f", {s.speed_up.reached} of {s.speed_up.pairs}"
    times = ("never" if math.isinf(t) else figure_text(t, 3) for t in s.running_times.values())
    return s.label, interval_text(s.area) if s.area else "–", *times, speed


def medians_sheet(results: Results, summaries: Mapping[str, Summary], order: Sequence[str]) -> Sheet:
    """Median loss of every searcher on every problem."""
    found = {key: {s.label: s.median.estimate for s in summary.standings} for key, summary in summaries.items()}
    best = {key: min(medians.values(), default=math.nan) for key, medians in found.items()}
    known = {k: info.optimum for k, info in results.problems.items() if info.optimum is not None}

    def cell(key: str, label: str) -> str:
        value = found[key].get(label, math.nan)
        return figure_text(value) + (" *" if value == best[key] else "")

    body = [(label, *(cell(key, label) for key in found)) for label in order]
    if known:
        body.append(("known optimum", *(figure_text(known.get(key, math.nan)) for key in found)))
    note = "Median held-out loss of finished searches; * the least of a column."
    return Sheet("Median on each problem", ("searcher", *found), tuple(body), note)


def lineage_sheet(results: Results, problem: str, *, most: int = 40) -> Sheet | None:
    """The steps from the first ancestor to the winner."""
    run = results.winner(problem)
    steps = lineage(run, results.problems[problem].space) if run else []
    if run is None or len(steps) < 2:
        return None
    shown = steps if len(steps) <= most else [*steps[:5], *steps[5 - most :]]
    body = tuple(
        (
            str(s.trial),
            str(s.generation),
            f"{s.tokens if run.tokens else s.evaluations:,}",
            "; ".join(f"{name} {a} → {b}" for name, a, b in s.changes[:8])
            + (f"; and {len(s.changes) - 8} more" if len(s.changes) > 8 else "")
            or f"first ancestor, {s.distance} units unlike uniform",
        )
        for s in shown
    )
    note = "" if len(steps) == len(shown) else f"The first 5 and the last {most - 5} of {len(steps)} steps."
    spent = "tokens spent" if run.tokens else "trials"
    return Sheet(f"Lineage of the winner, {run.label} seed {run.seed}", ("trial", "generation", spent, "changes"), body,
                 note, folded=True)  # fmt: skip


def render(results: Results, sections: Sequence[Section], verdict: str) -> str:
    """The page."""
    recorded = results.recorded
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("evo_hpo", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        results=results,
        sections=sections,
        verdict=verdict,
        facts=_facts(results),
        plan=recorded.plan_text,
        unfinished={r.id: f"{r.progress:.0%} of its budget spent" for r in results.runs if not r.finished}
        | dict(results.missing),
        machine={**_flat("", recorded.machine), **_flat("git ", recorded.git), **recorded.versions},
    )


def _facts(results: Results) -> dict[str, str]:
    budgets = {f"{v:,.15g} {k}" for r in results.runs for k, v in r.budget.items()}
    return {
        "problems": str(len(results.problems)),
        "searchers": str(len(results.labels)),
        "searches": f"{sum(r.finished for r in results.runs)} of {len(results.runs) + len(results.missing)}",
        "seeds": str(max((len(results.seeds(k)) for k in results.problems), default=0)),
        "budget of each search": " / ".join(sorted(budgets)) or "not recorded",
        "trials in all": f"{sum(r.evaluations for r in results.runs):,}",
        "tokens in all": f"{sum(r.tokens for r in results.runs):,}",
        "held-out checks": f"{sum(len(r.checkpoints) for r in results.runs):,}",
    } | ({} if any(r.tokens for r in results.runs) else {"tokens in all": "none: exact losses"})


def _flat(prefix: str, found: Mapping[str, Any]) -> dict[str, str]:
    return {f"{prefix}{k}": str(v) for k, v in found.items()}
