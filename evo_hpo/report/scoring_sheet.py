"""How a problem's trials were scored, as the searches noted it at their end: settings, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evo_hpo.report.page import Sheet
from evo_hpo.report.results import Results

SETTINGS = ("device", "dtype", "threads", "batch_size", "chunk", "compiled")
COUNTS = {"cached": "found in the cache", "stopped": "stopped early", "non_finite": "not finite",
          "out_of_memory": "out of memory"}  # fmt: skip


def scoring_sheet(results: Results, problem: str) -> Sheet | None:
    """One row a search with its settings and counts; None where no search of the problem noted any."""
    runs = [r for r in results.runs if r.problem == problem and r.scoring]
    if not runs:
        return None
    body = tuple((f"{r.label} s{r.seed}", _settings(r.scoring), *_counts(r.scoring)) for r in runs)
    failed = sum(int(r.scoring.get("non_finite", 0)) for r in runs)
    memory = sum(int(r.scoring.get("out_of_memory", 0)) for r in runs)
    note = (
        f"Losses that were not finite, in all: {failed}; they count as worst-possible. Times that memory ran out:"
        f" {memory}; the batch was halved and the search went on."
    )
    headers = ("search", "settings", *COUNTS.values())
    return Sheet("How trials were scored", headers, body, note, folded=not (failed or memory))


def _settings(scoring: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_text(scoring[name])}" for name in SETTINGS if name in scoring)


def _text(value: Any) -> str:
    return " x ".join(map(str, value)) or "no" if isinstance(value, list | tuple) else str(value)


def _counts(scoring: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{int(scoring.get(name, 0))}" for name in COUNTS)
