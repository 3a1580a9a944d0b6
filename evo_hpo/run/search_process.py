"""A process that runs searches of a comparison one after the other and reports what happens.

Each process makes each problem once and keeps it; where each seed has an instance of its own, the latest. What it
reports are the values of :mod:`evo_hpo.run.events`, and None when it is done; what must survive is in the journals,
which it writes itself.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from evo_hpo.errors import EvoHpoError
from evo_hpo.record.comparison import Comparison, PlannedSearch
from evo_hpo.record.journal import Journal, search_header
from evo_hpo.record.problem_record import ProblemRecord
from evo_hpo.record.records import SearchRecord
from evo_hpo.run.events import (
    BatchScored,
    CheckpointTaken,
    ProblemLoading,
    ProblemMade,
    SearchEnded,
    SearchFailed,
    SearchStarted,
)
from evo_hpo.run.plan import Plan
from evo_hpo.run.processes import follow_parent
from evo_hpo.search.budget import Ledger
from evo_hpo.search.loop import Checkpoint, search
from evo_hpo.search.problem import Problem
from evo_hpo.search.registry import make_problem, make_searcher
from evo_hpo.search.trial import Measured, Outcome

Maker = Callable[[str, dict[str, Any]], Problem]
"""Makes a problem from its name and settings."""


class _Queue(Protocol):
    def put(self, item: Any) -> None: ...

    def get(self) -> Any: ...


class _Reporter:
    """Tells what a search does; ``held`` is what its journal held before."""

    def __init__(self, search: str, events: _Queue, held: SearchRecord) -> None:
        self.search = search
        self.events = events
        self.held = held
        self.probes = 0

    def batch(self, outcomes: Sequence[Outcome], ledger: Ledger) -> None:
        loss = min((o.loss for o in outcomes if o.usable), default=None)
        failed = sum(o.status == "failed" for o in outcomes)
        replayed = ledger.evaluations <= len(self.held.outcomes)
        self.events.put(BatchScored(self.search, ledger.spent, ledger.evaluations, loss, failed, replayed))

    def probe(self, measured: Measured, ledger: Ledger) -> None:
        self.probes += 1
        replayed = self.probes <= len(self.held.probes)
        self.events.put(BatchScored(self.search, ledger.spent, ledger.evaluations, None, 0, replayed))

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        self.events.put(CheckpointTaken(self.search, checkpoint.held_out))


def run_searches(plan: Plan, folder: Path, resume: bool, cores: int, tasks: _Queue, events: _Queue) -> None:
    """Entry point of the process: takes tasks until it gets None; evaluators in it may use so many cores."""
    begin_process(cores)
    run_tasks(plan, folder, resume, tasks, events, lambda name, settings: make_problem(name, **settings))
    events.put(None)


def begin_process(cores: int) -> None:
    """Leaves interrupts to the parent, ends with it, and keeps numeric libraries to one thread each."""
    follow_parent()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"  # an evaluator runs one single-threaded replica a core
    os.environ["EVO_HPO_THREADS"] = str(cores)


def run_tasks(plan: Plan, folder: Path, resume: bool, tasks: _Queue, events: _Queue, make: Maker) -> None:
    """Runs the searches that the queue gives, until it gives None."""
    problems: dict[str, tuple[dict[str, Any], Problem]] = {}
    while (task := tasks.get()) is not None:
        try:
            _run(plan, folder, resume, task, problems, events, make)
        except EvoHpoError as error:
            events.put(SearchFailed(task.id, str(error)))
        except Exception as error:
            events.put(SearchFailed(task.id, f"{type(error).__name__}: {error}", traceback.format_exc()))


def _run(
    plan: Plan,
    folder: Path,
    resume: bool,
    task: PlannedSearch,
    problems: dict[str, tuple[dict[str, Any], Problem]],
    events: _Queue,
    make: Maker,
) -> None:
    key = task.problem
    entry = next(p for p in plan.problems if p.key == key)
    settings = entry.settings_of(task.seed)
    if key not in problems or problems[key][0] != settings:  # of several instances the latest is kept
        events.put(ProblemLoading(key))
        chosen = {**settings, **Comparison.read(folder).choices.get(key, {})}
        problems[key] = settings, make(entry.name, chosen)
        events.put(ProblemMade(ProblemRecord.of(key, problems[key][1], task.seed if entry.instance else None)))
    problem = problems[key][1]
    searcher = make_searcher(task.searcher, problem.space, seed=task.seed, **task.settings)
    budget = plan.budget
    header = search_header(
        task.id,
        task.searcher,
        problem,
        budget,
        seed=task.seed,
        settings=task.settings,
        minibatch_seed=task.seed,
        checkpoints=plan.checkpoints,
        plan={"name": plan.name},
        label=task.label,
    )
    header |= {"problem": key} | ({"instance": task.seed} if entry.instance else {})
    events.put(SearchStarted(task.id))
    with Journal.open(folder / task.journal, header, resume=resume) as journal:
        result = search(
            searcher,
            problem,
            budget=budget,
            seed=task.seed,
            journal=journal,
            observers=[_Reporter(task.id, events, journal.held)],
            checkpoints=plan.checkpoints,
        )
    events.put(SearchEnded(task.id, result.stop_reason))
