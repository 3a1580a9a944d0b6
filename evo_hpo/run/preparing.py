"""What a plan's problems need is built before searches start, side by side where devices and folders are apart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial

from evo_hpo.run.entries import ProblemEntry
from evo_hpo.run.plan import Plan
from evo_hpo.run.rehearsal import rehearse
from evo_hpo.search.registry import claims_of, prepare_problem, preview_problem

Progress = Callable[[str, int, int, str], None]
"""Called with (key of the problem, done, total, what is being worked on), from any thread."""


class _Stopped(Exception):
    """Ends a build beside one that failed."""


def prepare(plan: Plan, progress: Progress) -> None:
    """Checks every problem of the plan, then builds what is missing.

    Raises:
        EvoHpoError: a problem or searcher that cannot work, before anything is built; or a build failed. Others end at
            their next layer then, and what they wrote stays.
    """
    for entry in plan.problems:
        rehearse(plan, preview_problem(entry.name, entry.settings))
    groups, stop = _apart(plan.problems), threading.Event()

    def hear(key: str, done: int, total: int, what: str = "") -> None:
        if stop.is_set():
            raise _Stopped
        progress(key, done, total, what)

    def build(entries: Sequence[ProblemEntry]) -> None:
        for entry in entries:
            prepare_problem(entry.name, entry.settings, partial(hear, entry.key))

    if len(groups) < 2:
        return build(plan.problems)
    with ThreadPoolExecutor(len(groups)) as threads:
        builds = [threads.submit(build, group) for group in groups]
        try:
            for done in wait(builds, return_when=FIRST_EXCEPTION).done:
                done.result()
        finally:
            stop.set()


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
