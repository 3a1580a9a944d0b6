"""Journals of a comparison's folder as searches; whatever is not there yet is left out, with the reason."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evo_hpo.errors import EvoHpoError, JournalError
from evo_hpo.record.journal import SearchRecord, read_journal
from evo_hpo.report.comparison import disambiguate
from evo_hpo.report.runs import ProblemInfo, SearchRun
from evo_hpo.search.registry import describe_searcher

__all__ = ["read_runs"]


def read_runs(
    folder: Path, entries: Sequence[Mapping[str, Any]], problems: Mapping[str, ProblemInfo]
) -> tuple[tuple[SearchRun, ...], dict[str, str]]:
    """The searches that can be read, and id -> reason for those that cannot (not started, damaged)."""
    runs, missing = [], {}
    labels = disambiguate(entries)
    single = _single_seeded(entries, labels)
    for entry, label in zip(entries, labels, strict=True):
        path = folder / str(entry["journal"])
        if entry["problem"] not in problems or not path.exists():
            missing[str(entry["id"])] = "not started"
            continue
        try:
            record = read_journal(path)
        except JournalError as error:
            missing[str(entry["id"])] = str(error)
            continue
        fixed = (entry["problem"], label) in single and _ignores_seed(str(entry["searcher"]))
        runs.append(_run(entry, label, record, fixed))
    return tuple(runs), missing


def _run(entry: Mapping[str, Any], label: str, record: SearchRecord, deterministic: bool) -> SearchRun:
    end = record.end or {}
    return SearchRun(
        id=str(entry["id"]),
        problem=str(entry["problem"]),
        searcher=str(entry["searcher"]),
        label=label,
        seed=int(entry["seed"]),
        settings=dict(entry.get("settings") or {}),
        outcomes=tuple(record.outcomes),
        checkpoints=tuple(record.checkpoints),
        seconds=float(end.get("seconds", math.nan)),
        searcher_seconds=float(end.get("searcher_seconds", math.nan)),
        finished=record.finished,
        stop_reason=str(end.get("stop_reason", "")),
        deterministic=deterministic,
        budget=dict(record.header.get("budget") or {}),
        scoring=dict(end.get("scoring") or {}),
    )


def _single_seeded(entries: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> set[tuple[str, str]]:
    """(problem, label) of searchers planned for one seed where others have several."""
    seeds = Counter((str(e["problem"]), label) for e, label in zip(entries, labels, strict=True))
    most = {problem: max(n for (p, _), n in seeds.items() if p == problem) for problem, _ in seeds}
    return {(problem, label) for (problem, label), n in seeds.items() if n == 1 < most[problem]}


def _ignores_seed(searcher: str) -> bool:
    """True unless the installed searcher says that its seed matters; one that is not installed is taken at one seed."""
    try:
        return not describe_searcher(searcher).random
    except (EvoHpoError, ImportError):
        return True
