"""The table of a comparison: one row a searcher and problem, as values, text, CSV and Parquet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evo_hpo.report.results import Results
from evo_hpo.report.statistics import FEW, NOTHING, Interval, spread


@dataclass(frozen=True)
class Row:
    """Results of one searcher on one problem over its seeds; medians with their intervals. Lower loss is better.

    Attributes:
        searcher: shown name; ``dense`` for the uncompressed model.
        kind: ``dense``, ``uniform`` or ``search``.
        seeds: searches counted; ``planned``: that there should be, those without a readable journal among them;
            ``finished``: of those counted; ``progress``: share of all planned budgets that is spent, 0 to 1.
        loss, perplexity, average: held-out loss, perplexity, and cost a weight of the result.
        gain: percent below uniform's loss, positive is better; ``wins`` of ``compared`` seeds are below uniform. Where
            each seed has an instance of its own, that is uniform on this instance.
        gap: percent of the way from the known optimum (0) to uniform (100); NaN without a known optimum.
        reached: of the seeds, how many ended at the known optimum; 0 without one.
        text: which held-out text the figures are of, where they have names; ``text_gap``: how far the loss on it is
            above that on the first.
        tokens, trials, failed: charged tokens, scored trials, failed trials; medians.
        model_seconds, searcher_seconds: scoring, and the searcher's own time; medians.
    """

    problem: str
    searcher: str
    kind: str
    seeds: int = 0
    planned: int = 0
    finished: int = 0
    progress: float = 1.0
    loss: Interval = NOTHING
    perplexity: Interval = NOTHING
    average: Interval = NOTHING
    gain: Interval = NOTHING
    gap: Interval = NOTHING
    reached: int = 0
    wins: int = 0
    compared: int = 0
    tokens: float = math.nan
    trials: float = math.nan
    failed: float = math.nan
    model_seconds: float = math.nan
    searcher_seconds: float = math.nan
    text: str = ""
    text_gap: Interval = NOTHING


def rows(results: Results, problem: str) -> list[Row]:
    """Dense model first, then searchers by median held-out loss."""
    found = [_search_row(results, problem, label) for label in results.labels if results.of(problem, label)]
    found.sort(key=lambda r: (math.isnan(r.loss.estimate), r.loss.estimate))
    reference = results.problems[problem].reference
    known: dict[str, Any] = {key: spread([reference[key]]) for key in ("loss", "perplexity") if key in reference}
    known["text"] = (results.problems[problem].texts or ("",))[0]
    return [Row(problem, "dense", "dense", **known), *found] if reference else found


def rows_by_text(results: Results, problem: str) -> dict[str, list[Row]]:
    """Name of each held-out text -> the rows on it, in the order of the first; one without a name is called "" here.

    The row of a dense model that says nothing of a text is empty.
    """
    first = rows(results, problem)
    found = {(results.problems[problem].texts or ("",))[0]: first}
    for text in results.problems[problem].texts[1:]:
        own = {(r.kind, r.searcher): r for r in rows(results.on(problem, text), problem)}
        found[text] = [own.get((r.kind, r.searcher), Row(problem, r.searcher, r.kind, text=text)) for r in first]
    return found


def _search_row(results: Results, problem: str, label: str) -> Row:
    info = results.problems[problem]
    all_runs = results.of(problem, label)
    runs = [r for r in all_runs if r.final is not None]
    planned = len(all_runs) + len(results.absent(problem, label))
    losses = [r.loss for r in runs]
    bases = [(r.loss, results.uniform(problem, r.seed)) for r in runs if r.searcher != "uniform"]
    beside = [(loss, base.loss) for loss, base in bases if base is not None]
    gaps: list[float] = []
    reached = 0
    if info.optimum is not None:
        best, width = results.scale(problem)
        gaps = [100 * (x - best) / width for x in losses]
        reached = sum(x <= best + results.slack(problem) for x in losses)
    return Row(
        problem=problem,
        searcher=label,
        kind="uniform" if all_runs[0].searcher == "uniform" else "search",
        seeds=len(runs),
        planned=planned,
        finished=sum(r.finished for r in all_runs),
        progress=sum(r.progress for r in all_runs) / planned,
        loss=spread(losses),
        perplexity=spread([r.final.held_out.get("perplexity", math.nan) for r in runs if r.final]),
        average=spread([info.space.average(r.final.levels) for r in runs if r.final]),
        gain=spread([100 * (1 - loss / base) for loss, base in beside if base > 0]),
        gap=spread(gaps),
        reached=reached,
        wins=sum(loss < base for loss, base in beside),
        compared=len(beside),
        tokens=_median(r.tokens for r in all_runs),
        trials=_median(r.evaluations for r in all_runs),
        failed=_median(sum(o.status == "failed" for o in r.outcomes) for r in all_runs),
        model_seconds=_median(r.model_seconds for r in all_runs),
        searcher_seconds=_median(r.searcher_seconds for r in all_runs),
        text=info.texts[0] if info.texts else "",
        text_gap=spread([r.final.held_out.get("gap", math.nan) for r in runs if r.final]),
    )


def _median(values: Iterable[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return float(np.median(known)) if known else math.nan


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
    """``median [low, high]``; only the figure when there is one value, no width, or no median between its bounds."""
    middle, low, high = (figure_text(v, digits) for v in (interval.estimate, interval.low, interval.high))
    return middle if low == high or math.isnan(interval.estimate) else f"{middle} [{low}, {high}]"


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
    ranges = [r for r in found if r.loss.kind == "range"]
    if counts := sorted({r.seeds for r in ranges if r.seeds < FEW}):
        parts.append(f"least and greatest over {' or '.join(map(str, counts))} seeds (too few for a claim)")
    if any(r.seeds >= FEW for r in ranges):
        parts.append("least and greatest where a search failed")
    return "Median; in brackets: " + "; ".join(parts) + "." if parts else "One run each: no interval."


def cache_note(results: Results, problem: str) -> str:
    """Where some scores came from the cache: that seconds do not tell what a search would take alone; else nothing."""
    known = any(run.scoring.get("cached") for run in results.runs if run.problem == problem and run.scoring)
    return " What had been scored before took no model seconds; its tokens are charged alike." if known else ""


@dataclass(frozen=True)
class Column:
    """One column of the shown table.

    Attributes:
        key: what it holds, for code.
        short: its header in lines, for narrow terminals.
        priority: where the terminal is too narrow, columns go to a second table, 1 first; 0 stays.
        cells: one text a row.
    """

    key: str
    short: str
    priority: int
    cells: tuple[str, ...]

    @property
    def title(self) -> str:
        """The header in one line."""
        return self.short.replace("\n", " ")


def wins_text(row: Row) -> str:
    """In how many of the seeds that can be compared it is below uniform."""
    return f"{row.wins}/{row.compared}" if row.compared else "–"


def gap_text(row: Row) -> str:
    """Percent of the way from the known optimum to uniform, with its interval."""
    return "–" if math.isnan(row.gap.estimate) else interval_text(row.gap, 3)


def reached_text(row: Row) -> str:
    """How many of the seeds ended at the known optimum."""
    return "–" if row.kind == "dense" else f"{row.reached}/{row.seeds}"


def columns(results: Results, problem: str, found: Sequence[Row]) -> list[Column]:
    """The columns of the shown table; those that say nothing are left out."""
    info = results.problems[problem]
    searched = [r for r in found if r.kind != "dense"]
    measured = any(not math.isnan(r.perplexity.estimate) for r in found)
    compared = any(not math.isnan(r.gain.estimate) for r in searched)
    known = info.optimum is not None
    wanted: list[tuple[bool, str, str, int, Callable[[Row], str]]] = [
        (True, "searcher", "searcher", 0, lambda r: r.searcher),
        (True, "loss", "\n".join(info.loss_lines) + "\u00a0↓", 0, lambda r: interval_text(r.loss)),
        (compared, "gain", "below\nuniform", 0, lambda r: percent_text(r.gain)),
        (compared, "wins", "seeds\nbetter", 4, wins_text),
        (known and not info.instances, "gap", "gap to optimum\n(uniform = 100)", 0, gap_text),
        (known, "reached", "optimum reached", 0, reached_text),
        (measured, "perplexity", "perplexity\u00a0↓", 7, lambda r: interval_text(r.perplexity)),
        (not info.space.ranged, "average", "\n".join(info.average_lines), 0, lambda r: interval_text(r.average)),
        (any(r.tokens > 0 for r in searched), "tokens", "tokens", 6, lambda r: count_text(r.tokens)),
        (True, "trials", "trials", 1, lambda r: count_text(r.trials)),
        (any(r.failed > 0 for r in searched), "failed", "failed", 5, lambda r: count_text(r.failed)),
        (True, "model_seconds", "model\ns", 2, lambda r: seconds_text(r.model_seconds)),
        (True, "searcher_seconds", "searcher\ns", 3, lambda r: seconds_text(r.searcher_seconds)),
        (True, "seeds", "seeds", 0, seeds_text),
    ]
    return [Column(key, short, at, tuple(map(cell, found))) for says, key, short, at, cell in wanted if says]


# ---------------------------------------------------------------------- files


def table_frame(results: Results) -> pd.DataFrame:
    """The table as a DataFrame: intervals as three columns (``loss``, ``loss_low``, ``loss_high``) and their kind."""
    found = [r for key in results.problems for of in rows_by_text(results, key).values() for r in of]
    return pd.DataFrame([_flat(r) for r in found])


def _flat(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in asdict(row).items():
        if isinstance(value, dict):
            found |= {key: value["estimate"], f"{key}_low": value["low"], f"{key}_high": value["high"]}
        else:
            found[key] = value
    return found | {"interval": row.loss.kind}


def write_tables(results: Results, folder: Path) -> list[Path]:
    """Writes table.csv and .parquet (one row a searcher and held-out text), searches.csv and checkpoints.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    table = table_frame(results)
    paths = [folder / name for name in ("table.csv", "table.parquet", "searches.csv", "checkpoints.csv")]
    table.to_csv(paths[0], index=False)
    table.to_parquet(paths[1], index=False)
    results.frame().to_csv(paths[2], index=False)
    results.checkpoints().to_csv(paths[3], index=False)
    return paths
