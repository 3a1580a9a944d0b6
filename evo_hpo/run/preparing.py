"""What a plan's problems need is built before searches start, side by side where devices and folders are apart."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from evo_hpo.errors import EvoHpoError, StoreError
from evo_hpo.run import processes
from evo_hpo.run.entries import ProblemEntry
from evo_hpo.run.plan import Plan
from evo_hpo.run.rehearsal import rehearse
from evo_hpo.search.registry import claims_of, prepare_problem, preview_problem

Progress = Callable[[str, int, int, str], None]
"""Called with (key of the problem, done, total, what is being worked on)."""

Build = Callable[[str, dict[str, Any], Callable[..., None]], None]
"""Builds what a problem of this name and these settings needs, and tells (done, total, what is being worked on)."""


def prepare(plan: Plan, progress: Progress, build: Build = prepare_problem) -> None:
    """Checks every problem of the plan, then builds what is missing.

    Raises:
        EvoHpoError: a problem or searcher that cannot work, before anything is built; or a build failed. Others are
            ended then, and what they wrote stays.
    """
    rehearse(plan, *(preview_problem(entry.name, entry.settings) for entry in plan.problems))
    groups = _apart(plan.problems)
    if len(groups) < 2:
        _build(plan.problems, build, progress)
    else:
        _build_groups(groups, build, progress)


def _build_groups(groups: Sequence[Sequence[ProblemEntry]], build: Build, progress: Progress) -> None:
    events = processes.PROCESSES.Queue()
    workers = [(_build_beside, (group, build, events)) for group in groups]
    with processes.running(workers, events, _ended) as stream:
        for event in stream:
            if isinstance(event, _Failed):
                raise event.error from event.trace
            progress(*event)


def _build(entries: Sequence[ProblemEntry], build: Build, progress: Progress) -> None:
    for entry in entries:
        build(entry.name, entry.settings, partial(progress, entry.key))


def _build_beside(entries: Sequence[ProblemEntry], build: Build, events: Any) -> None:
    """Entry point of a process: to load a model changes what others in a process load (dtype, ties) at that moment."""
    processes.follow_parent()
    try:
        _build(entries, build, lambda *told: events.put(told))
    except Exception as error:
        events.put(
            _Failed(_portable(error), None if isinstance(error, EvoHpoError) else _Trace(traceback.format_exc()))
        )
    else:
        events.put(None)


class _Trace(Exception):
    """Where an error was raised in another process."""


@dataclass(frozen=True)
class _Failed:
    """The last event of a build that failed."""

    error: Exception
    trace: _Trace | None


def _portable(error: Exception) -> Exception:
    """The error, or where it cannot go from one process to another, one that says what it said."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return StoreError(f"a build failed: {type(error).__name__}: {error}")
    return error


def _ended(code: int) -> StoreError:
    return StoreError(
        f"a process that built levels ended with code {code} (out of memory?): what it wrote is kept; free memory, or"
        " build one store at a time with evo-hpo build, and start again"
    )


def _apart(entries: Sequence[ProblemEntry]) -> list[list[ProblemEntry]]:
    """Problems in groups that share no device and no folder; those without either need nothing built."""
    groups: list[tuple[set[str], list[ProblemEntry]]] = []
    for entry in entries:
        claims = claims_of(entry.name, entry.settings)
        if not (names := {*claims.devices, *map(str, claims.folders)}):
            continue
        meeting = [group for group in groups if group[0] & names]
        groups = [group for group in groups if group not in meeting]
        groups.append((names.union(*(g[0] for g in meeting)), [*(e for g in meeting for e in g[1]), entry]))
    return [found for _, found in groups]
