"""A process that runs searches of a comparison one after the other and reports what happens.

Each worker makes each problem once and keeps it. What it reports are small plain tuples; what must survive is in the
journals, which it writes itself.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from evo_hpo.errors import EvoHpoError
from evo_hpo.record.journal import Journal, search_header
from evo_hpo.run.plan import Plan, SearchTask
from evo_hpo.search.budget import Ledger
from evo_hpo.search.loop import Checkpoint, search
from evo_hpo.search.problem import Problem
from evo_hpo.search.registry import make_problem, make_searcher
from evo_hpo.search.trial import Outcome

__all__ = ["Event", "run_worker"]

Event = tuple[str, str, dict[str, Any]]
"""(kind, search id or problem key, details)."""


class _Queue(Protocol):
    def put(self, item: Any) -> None: ...

    def get(self) -> Any: ...


class _Reporter:
    """Observer that sends each batch and checkpoint to the parent process."""

    def __init__(self, task: SearchTask, events: _Queue) -> None:
        self.task = task
        self.events = events
        self.best: dict[tuple[int, int], float] = {}

    def batch(self, outcomes: Sequence[Outcome], ledger: Ledger) -> None:
        losses = [o.loss for o in outcomes if o.usable]
        self.events.put(
            (
                "batch",
                self.task.id,
                {
                    "spent": ledger.spent,
                    "trials": ledger.evaluations,
                    "loss": min(losses, default=None),
                    "failed": sum(o.status == "failed" for o in outcomes),
                    "reason": next((o.reason for o in outcomes if o.status == "failed"), ""),
                },
            )
        )

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        self.events.put(
            ("checkpoint", self.task.id, {"fraction": checkpoint.fraction, "held_out": checkpoint.held_out})
        )


def run_worker(plan: Plan, folder: Path, resume: bool, cores: int, tasks: _Queue, events: _Queue) -> None:
    """Entry point of the process: takes tasks until it gets None; evaluators in it may use so many cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    _die_with_parent()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"  # an evaluator runs one single-threaded replica a core
    os.environ["EVO_HPO_THREADS"] = str(cores)
    problems: dict[str, Problem] = {}
    while (task := tasks.get()) is not None:
        try:
            _run(plan, folder, resume, task, problems, events)
        except EvoHpoError as error:
            events.put(("error", task.id, {"message": str(error), "trace": ""}))
        except Exception as error:
            trace = traceback.format_exc()
            events.put(("error", task.id, {"message": f"{type(error).__name__}: {error}", "trace": trace}))
    events.put(("done", "", {}))


def _run(
    plan: Plan, folder: Path, resume: bool, task: SearchTask, problems: dict[str, Problem], events: _Queue
) -> None:
    key = task.problem.key
    if key not in problems:
        events.put(("loading", key, {}))
        problems[key] = make_problem(task.problem.name, **task.problem.settings)
        events.put(("problem", key, _describe(problems[key])))
    problem = problems[key]
    searcher = make_searcher(task.searcher.name, problem.space, seed=task.seed, **task.searcher.settings)
    budget = plan.budget.budget()
    header = search_header(
        task.id,
        task.searcher.name,
        problem,
        budget,
        seed=task.seed,
        settings=task.searcher.settings,
        minibatch_seed=task.seed,
        checkpoints=plan.checkpoints,
        plan={"name": plan.name},
        label=task.searcher.key,
    )
    header["problem"] = key
    events.put(("start", task.id, {}))
    with Journal.open(folder / "journals" / f"{task.id}.jsonl", header, resume=resume) as journal:
        result = search(
            searcher,
            problem,
            budget=budget,
            seed=task.seed,
            journal=journal,
            observers=[_Reporter(task, events)],
            checkpoints=plan.checkpoints,
        )
    events.put(
        ("end", task.id, {"reason": result.stop_reason, "best_loss": result.best_loss, "seconds": result.seconds})
    )


def _describe(problem: Problem) -> dict[str, Any]:
    return {
        "space": problem.space.to_json(),
        "fingerprint": problem.fingerprint(),
        "reference": problem.reference(),
        "optimum": problem.optimum,
        "describe": problem.space.describe(),
        "notes": list(problem.notes),
    }


def _die_with_parent() -> None:
    """Ends this process when its parent is gone, also when that was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
