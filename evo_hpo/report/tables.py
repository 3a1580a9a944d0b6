"""The table of a comparison: one row a searcher and problem, for the terminal and as CSV and Parquet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from evo_hpo.report.comparison import Comparison
from evo_hpo.report.statistics import Interval, spread

__all__ = ["FinalTable", "Row", "final_table", "figure_text", "interval_text", "rows", "table_frame", "write_tables"]


@dataclass(frozen=True)
class Row:
    """Results of one searcher on one problem over its seeds; medians with their intervals. Lower loss is better.

    Attributes:
        searcher: shown name; ``dense`` for the uncompressed model.
        kind: ``dense``, ``uniform`` or ``search``.
        seeds: searches counted; ``planned``: that there should be; ``finished``: of those counted.
        loss, perplexity, average: held-out loss, perplexity, and cost a weight of the result.
        gain: percent below uniform's loss, positive is better; ``wins`` of ``compared`` seeds are below uniform.
        gap: percent of the way from the known optimum (0) to uniform (100); NaN without a known optimum.
        reached: of the seeds, how many ended at the known optimum; 0 without one.
        tokens, trials, failed: charged tokens, scored trials, failed trials; medians.
        model_seconds, searcher_seconds: scoring, and the searcher's own time; medians.
    """

    problem: str
    searcher: str
    kind: str
    seeds: int
    planned: int
    finished: int
    progress: float
    loss: Interval
    perplexity: Interval
    average: Interval
    gain: Interval
    gap: Interval
    reached: int
    wins: int
    compared: int
    tokens: float
    trials: float
    failed: float
    model_seconds: float
    searcher_seconds: float


NOTHING = Interval(math.nan, math.nan, math.nan, "none", 0)


def rows(comparison: Comparison, problem: str) -> list[Row]:
    """Dense model first, then searchers by median held-out loss."""
    found = [_search_row(comparison, problem, label) for label in comparison.labels if comparison.of(problem, label)]
    found.sort(key=lambda r: (math.isnan(r.loss.estimate), r.loss.estimate))
    dense = _dense_row(comparison, problem)
    return [*([dense] if dense else []), *found]


def _dense_row(comparison: Comparison, problem: str) -> Row | None:
    reference = comparison.problems[problem].reference
    if not reference:
        return None

    def known(key: str) -> Interval:
        return spread([reference[key]]) if key in reference else NOTHING

    return Row(
        problem, "dense", "dense", 0, 0, 0, 1.0, known("loss"), known("perplexity"), NOTHING, NOTHING, NOTHING, 0, 0, 0,
        *[math.nan] * 5,
    )  # fmt: skip


def _search_row(comparison: Comparison, problem: str, label: str) -> Row:
    info = comparison.problems[problem]
    all_runs = comparison.of(problem, label)
    runs = [r for r in all_runs if r.final is not None]
    uniform = comparison.uniform(problem)
    losses = [r.loss for r in runs]
    compare = uniform is not None and runs and runs[0].searcher != "uniform"
    gains = [100 * (1 - x / uniform.loss) for x in losses] if uniform and compare and uniform.loss > 0 else []
    gaps: list[float] = []
    reached = 0
    if info.optimum is not None:
        best, width = comparison.scale(problem)
        gaps = [100 * (x - best) / width for x in losses]
        reached = sum(x <= best + comparison.slack(problem) for x in losses)
    return Row(
        problem=problem,
        searcher=label,
        kind="uniform" if all_runs[0].searcher == "uniform" else "search",
        seeds=len(runs),
        planned=len(all_runs),
        finished=sum(r.finished for r in all_runs),
        progress=float(np.mean([r.progress for r in all_runs])),
        loss=spread(losses),
        perplexity=spread([r.final.held_out.get("perplexity", math.nan) for r in runs if r.final]),
        average=spread([info.space.average(r.final.levels) for r in runs if r.final]),
        gain=spread(gains),
        gap=spread(gaps),
        reached=reached,
        wins=sum(x < uniform.loss for x in losses) if uniform and compare else 0,
        compared=len(losses) if compare else 0,
        tokens=_median(r.tokens for r in all_runs),
        trials=_median(r.evaluations for r in all_runs),
        failed=_median(sum(o.status == "failed" for o in r.outcomes) for r in all_runs),
        model_seconds=_median(r.model_seconds for r in all_runs),
        searcher_seconds=_median(_known([r.searcher_seconds for r in all_runs])),
    )


def _known(values: Sequence[float]) -> list[float]:
    return [v for v in values if not math.isnan(v)]


def _median(values: Any) -> float:
    found = list(values)
    return float(np.median(found)) if found else math.nan


# ---------------------------------------------------------------------- text


def figure_text(value: float, digits: int = 4) -> str:
    """A figure to ``digits`` significant digits, without exponents where they can be avoided."""
    if math.isnan(value):
        return "–"
    if not math.isfinite(value):
        return "failed" if value > 0 else "-inf"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def interval_text(interval: Interval, digits: int = 4) -> str:
    """``median [low, high]``; only the figure when there is one value, or no width."""
    middle, low, high = (figure_text(v, digits) for v in (interval.estimate, interval.low, interval.high))
    return middle if low == high else f"{middle} [{low}, {high}]"


def percent_text(interval: Interval) -> str:
    """A gain in percent with its sign and interval."""
    if math.isnan(interval.estimate):
        return "–"
    low, high = f"{interval.low:+.1f}", f"{interval.high:+.1f}"
    return f"{interval.estimate:+.1f} %" + ("" if low == high else f" [{low}, {high}]")


def count_text(value: float) -> str:
    """A count with separators."""
    return "–" if math.isnan(value) else f"{value:,.0f}"


def seconds_text(value: float) -> str:
    """Seconds, one decimal under ten, three digits under a tenth."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else f"{value:.3f}"


def seeds_text(row: Row) -> str:
    """How many seeds, and how far when some are unfinished."""
    if row.kind == "dense":
        return "–"
    if row.finished == row.planned:
        return str(row.planned)
    return f"{row.finished} of {row.planned}" + (f" ({row.progress:.0%})" if not math.isnan(row.progress) else "")


def interval_note(found: Sequence[Row]) -> str:
    """What the brackets are, in words."""
    kinds = {r.loss.kind for r in found if r.kind != "dense"}
    parts = []
    if "95 % bootstrap" in kinds:
        parts.append("95 % bootstrap interval of the median over seeds")
    if "range" in kinds:
        counts = sorted({r.seeds for r in found if r.loss.kind == "range"})
        parts.append(f"least and greatest over {' or '.join(map(str, counts))} seeds (too few for a claim)")
    return "Median; in brackets: " + "; ".join(parts) + "." if parts else "One run each: no interval."


def columns(comparison: Comparison, problem: str, found: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """Header -> cells of the shown table; columns that say nothing are left out."""
    info = comparison.problems[problem]
    searched = [r for r in found if r.kind != "dense"]
    table = [
        ("searcher", [r.searcher for r in found]),
        (f"{info.loss_name}\u00a0↓", [interval_text(r.loss) for r in found]),
    ]
    if any(not math.isnan(r.gain.estimate) for r in searched):
        wins = [f"{r.wins}/{r.compared}" if r.compared else "–" for r in found]
        table += [("below uniform", [percent_text(r.gain) for r in found]), ("seeds better", wins)]
    if info.optimum is not None:
        gaps = ["–" if math.isnan(r.gap.estimate) else interval_text(r.gap, 3) for r in found]
        table.append(("gap to optimum (uniform = 100)", gaps))
        table.append(("optimum reached", [f"{r.reached}/{r.seeds}" if r.kind != "dense" else "–" for r in found]))
    if any(not math.isnan(r.perplexity.estimate) for r in found):
        table.append(("perplexity\u00a0↓", [interval_text(r.perplexity) for r in found]))
    table.append((info.average_name, [interval_text(r.average) for r in found]))
    if any(r.tokens > 0 for r in searched):
        table.append(("tokens", [count_text(r.tokens) for r in found]))
    table.append(("trials", [count_text(r.trials) for r in found]))
    if any(r.failed > 0 for r in searched):
        table.append(("failed", [count_text(r.failed) for r in found]))
    table.append(("model s", [seconds_text(r.model_seconds) for r in found]))
    table.append(("searcher s", [seconds_text(r.searcher_seconds) for r in found]))
    table.append(("seeds", [seeds_text(r) for r in found]))
    return table


EXPENDABLE = ("trials", "model s", "searcher s", "seeds better", "failed", "tokens", "perplexity\u00a0↓")
"""Columns that go into a second table where the terminal is narrow, first to go first."""


def problem_table(
    comparison: Comparison, problem: str, *, compact: bool = False, moved: Sequence[str] = (), second: bool = False
) -> Table:
    """The table of one problem for the terminal.

    ``compact`` breaks its cells into lines; columns in ``moved`` are left to the ``second`` table, which has only them.
    """
    found = rows(comparison, problem)
    shown = columns(comparison, problem, found)
    shown = [(h, c) for h, c in shown if (h in moved) == second or h == "searcher"]
    title = None if second else comparison.name if len(comparison.problems) == 1 else f"{comparison.name}: {problem}"
    caption = None if second else interval_note(found)
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.caption_justify = "left"
    for i, (header, _) in enumerate(shown):
        text = (
            header.replace(" (", "\n(")
            .replace(" a weight", "\na weight")
            .replace(", share", ",\nshare")
            .replace("r s", "r\ns")
        )
        text = text.replace("l s", "l\ns").replace("w u", "w\nu").replace("s b", "s\nb") if compact else header
        table.add_column(text, justify="right" if i else "left", no_wrap=True)
    best = next((r.searcher for r in found if r.kind != "dense"), None)
    for i, r in enumerate(found):
        style = "bold" if r.searcher == best else {"dense": "dim", "uniform": "italic"}.get(r.kind, "")
        cells = [
            _broken(c[i], second or j < 3 or h.startswith("perplexity")) if compact else c[i]
            for j, (h, c) in enumerate(shown)
        ]
        table.add_row(*(Text(c, style=style) for c in cells))
    return table


def _broken(cell: str, interval: bool) -> str:
    """A cell on two lines; without its interval where there is no room for it."""
    return cell.replace(" [", "\n[").replace(":", ":\n") if interval else cell.split(" [")[0]


class FinalTable:
    """Tables of all problems, each as wide as the terminal allows."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        keys = [key for key in self.comparison.problems if self.comparison.of(key)]
        for key in keys:
            yield from self._fitting(key, console, options)
        if not keys:
            yield Text("no search has a result yet")

    def _fitting(self, key: str, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        table = problem_table(self.comparison, key)
        moved: tuple[str, ...] = ()
        for count in range(len(EXPENDABLE) + 1):
            if _width(table, console, options) <= options.max_width:
                break
            moved = EXPENDABLE[:count]
            table = problem_table(self.comparison, key, compact=True, moved=moved)
        yield table
        if moved:
            yield problem_table(self.comparison, key, compact=True, moved=moved, second=True)


def _width(table: Table, console: Console, options: ConsoleOptions) -> int:
    """Columns of the terminal that a table wants; its caption may be broken and does not count."""
    table.caption, caption = None, table.caption
    width = Measurement.get(console, options.update(max_width=10_000), table).maximum
    table.caption = caption
    return width


def final_table(comparison: Comparison) -> FinalTable:
    """The table to print when a comparison ends (or so far): one block a problem, best searcher first."""
    return FinalTable(comparison)


# ---------------------------------------------------------------------- files


def table_frame(comparison: Comparison) -> pd.DataFrame:
    """The table as a DataFrame: intervals as three columns (``loss``, ``loss_low``, ``loss_high``) and their kind."""
    flat = [_flat(r) for key in comparison.problems for r in rows(comparison, key)]
    return pd.DataFrame(flat)


def _flat(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in asdict(row).items():
        if isinstance(value, dict):
            found |= {key: value["estimate"], f"{key}_low": value["low"], f"{key}_high": value["high"]}
        else:
            found[key] = value
    return found | {"interval": row.loss.kind}


def write_tables(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes table.csv and .parquet (one row a searcher), searches.csv and checkpoints.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    table = table_frame(comparison)
    paths = [folder / name for name in ("table.csv", "table.parquet", "searches.csv", "checkpoints.csv")]
    table.to_csv(paths[0], index=False)
    table.to_parquet(paths[1], index=False)
    comparison.frame().to_csv(paths[2], index=False)
    comparison.checkpoints().to_csv(paths[3], index=False)
    return paths
