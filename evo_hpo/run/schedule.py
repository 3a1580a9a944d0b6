"""Runs a plan: every search of its grid, in processes, resumable, with everything on disk in one folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from evo_hpo.errors import EvoHpoError, JournalError, MissingPackageError, PlanError
from evo_hpo.record.comparison import ERRORS, Comparison, PlannedSearch
from evo_hpo.record.environment import cores
from evo_hpo.run import processes
from evo_hpo.run.cluster_process import run_on_cluster
from evo_hpo.run.events import Event, Listener, ProblemMade, SearchFailed
from evo_hpo.run.plan import Plan
from evo_hpo.run.search_process import run_searches
from evo_hpo.search.registry import claims_of, settled

DEFAULT_ROOT = Path("mlruns") / "comparisons"


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
        try:
            if Comparison.lies_in(folder):
                Comparison.read(folder).refuse_other_plan(plan.plain())
            return folder
        except JournalError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def check_ray(address: str | None) -> None:
    """Raises MissingPackageError where a cluster is asked for without the extra ``ray``."""
    if address and find_spec("ray") is None:
        raise MissingPackageError("scoring on a Ray cluster needs Ray: pip install 'evo-hpo[ray]'")


def compare(
    plan: Plan,
    *,
    root: Path = DEFAULT_ROOT,
    resume: bool = False,
    listener: Listener = lambda event: None,
    plan_text: str | None = None,
    folder: Path | None = None,
    ray: str | None = None,
) -> Path:
    """Runs every search of the plan and returns the comparison's folder.

    Args:
        plan: checked with ``plan.check()`` by the caller or here.
        root: where comparison folders live.
        resume: go on with the newest comparison of this name; finished searches are replayed from their journals.
        listener: hears every event, in this process.
        plan_text: the plan file's text, copied into the folder.
        folder: use this folder instead of the next free one.
        ray: address of a Ray cluster (``auto``: the one that runs here; ``local``: one is started) whose devices score;
            searchers and journals stay here. Results do not depend on it.

    Raises:
        EvoHpoError: bad input, before any work.
        ComparisonFailed: a search failed; the others' results are kept.
        KeyboardInterrupt: after stopping the processes; everything scored so far is on disk.
    """
    plan.check()
    check_ray(ray)
    folder = folder or comparison_folder(plan, root, resume=resume)
    tasks = list(plan.planned())
    comparison = _settled(Comparison.start(folder, plan.plain(), tasks, plan_text), plan)
    failures, traced = list[str](), 0
    with _processes(plan, folder, resume, tasks, ray) as events:
        for event in events:
            match event:
                case ProblemMade(problem):
                    comparison = comparison.with_problem(problem)
                case SearchFailed(search, message, trace):
                    if not search:
                        raise ComparisonFailed(message)
                    failures.append(f"{search}: {message}")
                    traced += bool(trace)
                    comparison.note_failure(search, trace)
            listener(event)
    comparison.write_profiles()
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        trace = f"; the trace is in {comparison.folder / ERRORS}" if traced else ""
        failed = ComparisonFailed(f"{failures[0]}{more}{trace}")
        failed.exit_code = 1 if traced else 2  # of what nobody expected the cause is not known
        raise failed
    return folder


def _settled(comparison: Comparison, plan: Plan) -> Comparison:
    """The comparison with what its problems' settings leave to the machine: settled once, whoever makes them."""
    choices = dict(comparison.choices)
    for entry in plan.problems:
        known = comparison.problems.get(entry.key)
        if entry.key not in choices and (
            chosen := settled(entry.name, entry.settings, known.fingerprint if known else {})
        ):
            choices[entry.key] = chosen
    return comparison.with_choices(choices)


def process_count(plan: Plan, tasks: int) -> tuple[int, int]:
    """Processes that a plan runs at the same time on this machine, and the cores that each may use.

    Unless the plan says how many: one where a GPU scores, whose memory each would fill anew, else one a core.
    """
    devices = {device for entry in plan.problems for device in claims_of(entry.name, entry.settings).devices}
    most = plan.workers or (cores() if devices <= {"cpu"} else 1)
    count = max(1, min(most, tasks))
    return count, max(1, cores() // count)


@contextmanager
def _processes(
    plan: Plan, folder: Path, resume: bool, tasks: Sequence[PlannedSearch], ray: str | None
) -> Iterator[Iterator[Event]]:
    """Starts the processes, hands out the tasks, gives the stream of events; leaves no process behind."""
    waiting, events = processes.PROCESSES.Queue(), processes.PROCESSES.Queue()
    for task in tasks:
        waiting.put(task)
    workers: list[processes.Worker]
    if ray:
        workers = [(run_on_cluster, (plan, folder, resume, ray, waiting, events))]
        why, remedy = "is Ray's head gone?", "start Ray again"
    else:
        count, cores = process_count(plan, len(tasks))
        workers = [(run_searches, (plan, folder, resume, cores, waiting, events))] * count
        for _ in range(count):
            waiting.put(None)
        why, remedy = "out of memory?", "lower `workers`"

    def ended(code: int) -> ComparisonFailed:
        return ComparisonFailed(
            f"a worker process ended with code {code} ({why}): what it scored is in the journals; {remedy} and resume"
        )

    # a cluster's process may start Ray here, so it may have children
    try:
        with processes.running(workers, events, ended, children=bool(ray)) as stream:
            yield stream
    finally:
        waiting.cancel_join_thread()
