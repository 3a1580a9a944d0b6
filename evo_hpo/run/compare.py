"""Runs a plan: every search of its grid, in worker processes, resumable, with everything on disk in one folder.

<root>/<name>/plan.toml          what was asked
              comparison.json    problems, searches, machine, versions
              journals/*.jsonl   the record, one file a search
              profiles/*.json    the recommended assignment of each search; winner.json
              report/            tables and pictures
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evo_hpo.errors import EvoHpoError, JournalError, PlanError
from evo_hpo.record.environment import environment
from evo_hpo.record.profiles import write_profiles
from evo_hpo.run.plan import Plan, SearchTask
from evo_hpo.run.worker import Event, run_worker

__all__ = ["DEFAULT_ROOT", "ComparisonFailed", "Listener", "comparison_folder", "compare"]

DEFAULT_ROOT = Path("mlruns") / "comparisons"

Listener = Callable[[Event], None]
"""Hears every event of a comparison; see :mod:`evo_hpo.run.worker` for the kinds."""


class ComparisonFailed(EvoHpoError):
    """A search could not go on; what it had scored is in its journal."""


def comparison_folder(plan: Plan, root: Path, *, resume: bool) -> Path:
    """The newest comparison of this name and plan (``resume``), or the next free folder: name, name-2, name-3, ...

    Raises:
        PlanError: nothing to resume.
        JournalError: the plan to resume differs from the one that was started; the message names the keys.
    """
    number, found = 1, list[Path]()
    while (candidate := root / (plan.name if number == 1 else f"{plan.name}-{number}")).exists():
        found, number = [candidate, *found], number + 1
    if not resume:
        return candidate
    if not found:
        raise PlanError(f"nothing to resume: there is no comparison {plan.name!r} in {root}; start without --resume")
    refused: JournalError | None = None
    for folder in found:
        record = folder / "comparison.json"
        try:
            if record.exists():
                _refuse_changed_plan(json.loads(record.read_text(encoding="utf-8"))["plan"], _plain(plan), folder)
            return folder
        except JournalError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _plain(plan: Plan) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(plan.model_dump_json(exclude_none=True))
    return data


def _refuse_changed_plan(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    free = {"workers", "description"}  # they change no result
    changed = [k for k in {**old, **new} if k not in free and old.get(k) != new.get(k)]
    if changed:
        shown = "; ".join(f"{k}: {_difference(old.get(k), new.get(k))}" for k in changed)
        raise JournalError(f"{folder} was started with another plan ({shown}): restore it, or start anew")


def _difference(old: object, new: object) -> str:
    if isinstance(old, list) and isinstance(new, list):
        gone, added = [x for x in old if x not in new], [x for x in new if x not in old]
        parts = [f"{verb} {_short(entries)}" for verb, entries in (("had", gone), ("now has", added)) if entries]
        return ", ".join(parts) or "has another order"
    return f"was {_short(old)}, is {_short(new)}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def compare(
    plan: Plan,
    *,
    root: Path = DEFAULT_ROOT,
    resume: bool = False,
    listener: Listener = lambda event: None,
    plan_text: str | None = None,
    folder: Path | None = None,
) -> Path:
    """Runs every search of the plan and returns the comparison's folder.

    Args:
        plan: checked with ``plan.check()`` by the caller or here.
        root: where comparison folders live.
        resume: go on with the newest comparison of this name; finished searches are replayed from their journals.
        listener: hears every event, in this process.
        plan_text: the plan file's text, copied into the folder.
        folder: use this folder instead of the next free one.

    Raises:
        EvoHpoError: bad input, before any work.
        ComparisonFailed: a search failed; the others' results are kept.
        KeyboardInterrupt: after stopping the workers; everything scored so far is on disk.
    """
    plan.check()
    folder = folder or comparison_folder(plan, root, resume=resume)
    (folder / "journals").mkdir(parents=True, exist_ok=True)
    tasks = list(plan.tasks())
    problems: dict[str, Any] = {}
    record = folder / "comparison.json"
    if record.exists():
        problems = json.loads(record.read_text(encoding="utf-8"))["problems"]
    _write_record(record, plan, problems, tasks)
    if plan_text is not None:
        _write(folder / "plan.toml", plan_text)
    failures: list[str] = []
    with _workers(plan, folder, resume, tasks) as events:
        for event in events:
            kind, key, details = event
            if kind == "problem":
                _same_problem(key, problems.get(key), details)
                problems[key] = details
                _write_record(record, plan, problems, tasks)
            elif kind == "error":
                failures.append(f"{key}: {details['message']}")
                if details["trace"]:
                    with (folder / "errors.log").open("a", encoding="utf-8") as log:
                        log.write(f"{key}\n{details['trace']}\n")
            listener(event)
    write_profiles(folder)
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise ComparisonFailed(f"{failures[0]}{more}")
    return folder


def _same_problem(key: str, known: dict[str, Any] | None, found: dict[str, Any]) -> None:
    """Refuses searches on unequal data or spaces: their figures would not be comparable."""
    if known is None or known["fingerprint"] == found["fingerprint"]:
        return
    changed = [
        f"{k}: was {known['fingerprint'].get(k)}, is {v}"
        for k, v in found["fingerprint"].items()
        if known["fingerprint"].get(k) != v
    ]
    raise JournalError(f"problem {key!r} is not the one this comparison started with ({'; '.join(changed)})")


def _write_record(path: Path, plan: Plan, problems: dict[str, Any], tasks: Sequence[SearchTask]) -> None:
    searches = [
        {
            "id": t.id,
            "problem": t.problem.key,
            "searcher": t.searcher.name,
            "label": t.searcher.key,
            "settings": t.searcher.settings,
            "seed": t.seed,
            "journal": f"journals/{t.id}.jsonl",
        }
        for t in tasks
    ]
    data = {"name": path.parent.name, "plan": _plain(plan), "problems": problems, "searches": searches}
    _write(path, json.dumps(data | {"created": time.time(), **environment()}, indent=1))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def worker_count(plan: Plan, tasks: int) -> tuple[int, int]:
    """Processes that a plan runs at the same time on this machine, and the cores that each may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, min(plan.workers or cores, tasks))
    return count, max(1, cores // count)


@contextmanager
def _workers(plan: Plan, folder: Path, resume: bool, tasks: Sequence[SearchTask]) -> Iterator[Iterator[Event]]:
    """Starts the workers, hands out the tasks, gives the stream of events; leaves no process behind."""
    context = multiprocessing.get_context("spawn")
    waiting, events = context.Queue(), context.Queue()
    count, cores = worker_count(plan, len(tasks))
    for task in tasks:
        waiting.put(task)
    for _ in range(count):
        waiting.put(None)
    processes = [
        context.Process(target=run_worker, args=(plan, folder, resume, cores, waiting, events), daemon=True)
        for _ in range(count)
    ]
    started = []
    try:
        for process in processes:
            process.start()
            started.append(process)
        yield _stream(events, processes)
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
        for process in started:
            process.join(timeout=10)
        waiting.cancel_join_thread()
        events.cancel_join_thread()


def _stream(events: Any, processes: Sequence[Any]) -> Iterator[Event]:
    running = len(processes)
    while running:
        try:
            event: Event = events.get(timeout=1.0)
        except queue.Empty:
            dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
            if dead:
                raise ComparisonFailed(
                    f"a worker process ended with code {dead[0]} (out of memory? a script of your own without"
                    ' `if __name__ == "__main__":`?): what it scored is in the journals; lower `workers` and resume'
                ) from None
            if not any(p.is_alive() for p in processes):
                return
            continue
        if event[0] == "done":
            running -= 1
        else:
            yield event
