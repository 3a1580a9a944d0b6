"""What a journal costs a search, and how many trials a second reach MLflow.

    python -m benchmarks.measurements.tracking.throughput

Run it alone on the machine. Prints Markdown tables: overhead of the journal in the loop; trials a second for 30 and
210 units, written directly and through MLflow's API; file size and search times at 20 000 trials.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from evo_hpo import Batch, Budget, CompressionSpace, FunctionProblem, Outcome, SearchResult, Terms, Trial, Unit
from evo_hpo.record.journal import Journal, search_header
from evo_hpo.search.budget import Allowance
from evo_hpo.search.loop import search
from evo_hpo.search.searcher import Searcher
from evo_hpo.tracking.mlflow_store import connect, prepare_store
from evo_hpo.tracking.mlflow_tracker import MlflowTracker
from evo_hpo.tracking.writer import Replayer


class Repeat(Searcher):
    """Asks for one assignment again and again: all that is left is the loop."""

    def __init__(self, space: CompressionSpace, *, seed: int = 0, batch: int = 1) -> None:
        super().__init__(space, seed=seed)
        self.batch = batch
        self.levels = space.uniform()

    def ask(self, allowance: Allowance) -> Batch:
        return self.propose([self.levels] * self.batch)

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        self.remember(outcomes)


def made_problem(units: int) -> FunctionProblem:
    """A problem that costs nothing to score."""
    space = CompressionSpace([Unit(f"model.layers.{i}.proj", (2, 3, 4, 5)) for i in range(units)], 3 * units)
    return FunctionProblem(space, lambda levels: 1.0)


def overhead(units: int, batch: int, work: Path, trials: int = 2000) -> tuple[float, float]:
    """Milliseconds a trial of the loop without a journal, and what a journal adds."""
    problem, budget = made_problem(units), Budget(evaluations=trials)
    header = search_header("repeat-s0", "repeat", problem, budget)  # git and processor are looked up once a search
    times = []
    for journaled in (False, True):
        path = work / f"overhead-{units}-{batch}-{time.monotonic_ns()}.jsonl"
        searcher = Repeat(problem.space, batch=batch)
        start = time.perf_counter()
        with Journal.open(path, header) if journaled else nullcontext() as journal:
            search(searcher, problem, budget=budget, journal=journal)
        times.append(1000 * (time.perf_counter() - start) / trials)
    return times[0], times[1] - times[0]


def journal_of(units: int, trials: int, path: Path, seed: int = 0) -> None:
    """A finished journal of random trials in batches of 16."""
    problem = made_problem(units)
    header = search_header(path.stem, "repeat", problem, Budget(evaluations=trials), seed=seed)
    rng = np.random.default_rng(seed)
    with Journal.open(path, header) as journal:
        for at in range(0, trials, 16):
            levels = rng.integers(0, 4, (min(16, trials - at), units))
            asked = [Trial(at + i, tuple(map(int, row))) for i, row in enumerate(levels)]
            terms = Terms(generation=at // 16)
            journal.record([Outcome(t, float(rng.random()), 1024, 0.1, 7, terms=terms) for t in asked])
        journal.finish(SearchResult(stop_reason="the budget is spent"))


def replayed(folder: Path, uri: str, direct: bool) -> float:
    """Seconds of writing all journals of a folder into an empty store."""
    prepare_store(uri)
    connect(uri)
    replayer = Replayer(folder, lambda: MlflowTracker(uri, folder.name, direct=direct))
    start = time.perf_counter()
    while replayer.read():
        replayer.step()
    return time.perf_counter() - start


def search_times(uri: str) -> dict[str, float]:
    """Milliseconds of the queries that people and the UI make; median of five."""
    client = connect(uri)
    (experiment,) = (e.experiment_id for e in client.search_experiments() if e.name != "Default")
    best = {"order_by": ["metrics.loss ASC"], "max_results": 100}
    queries: dict[str, dict[str, Any]] = {
        "the searches": {"filter_string": "tags.kind = 'search'", "max_results": 100},
        "100 best trials of all": {"filter_string": "tags.kind = 'trial'", **best},
        "100 best trials of one search": {"filter_string": "tags.search = 'repeat-s0' and tags.kind = 'trial'", **best},
        "newest 100 runs": {"max_results": 100},
        "1000 trials in a page": {"filter_string": "tags.kind = 'trial'", "max_results": 1000},
    }
    found = {}
    for name, query in queries.items():
        times = []
        for _ in range(5):
            start = time.perf_counter()
            client.search_runs([experiment], **query)
            times.append(1000 * (time.perf_counter() - start))
        found[name] = sorted(times)[2]
    return found


def report(trials: int, work: Path) -> None:
    """Measures everything and prints it."""
    connect(f"sqlite:///{work / 'first.db'}")  # imports and migrations are not what is timed
    print("| units | trials a batch | loop alone, ms a trial | the journal adds, ms a trial |\n|---|---|---|---|")
    for units in (30, 210):
        for batch in (1, 16):
            alone, added = overhead(units, batch, work)
            print(f"| {units} | {batch} | {alone:.3f} | {added:.3f} |")
    print("\n| units | trials | through | trials a second | database, kB a trial | journal, kB a trial |")
    print("|---|---|---|---|---|---|")
    for units in (30, 210):
        for direct, count in ((True, 5000), (False, 300)):
            folder = work / f"{units}-{direct}"
            journal_of(units, count, folder / "journals" / "repeat-s0.jsonl")
            database = work / f"{units}-{direct}.db"
            seconds = replayed(folder, f"sqlite:///{database}", direct)
            sizes = [p.stat().st_size / 1000 / count for p in (database, folder / "journals" / "repeat-s0.jsonl")]
            way = "tables" if direct else "API"
            print(f"| {units} | {count} | {way} | {count / seconds:.0f} | {sizes[0]:.1f} | {sizes[1]:.2f} |")
    folder = work / "many"
    for seed in range(10):
        journal_of(210, trials // 10, folder / "journals" / f"repeat-s{seed}.jsonl", seed)
    uri = f"sqlite:///{work / 'many.db'}"
    seconds = replayed(folder, uri, direct=True)
    size = (work / "many.db").stat().st_size / 1e6
    speed = trials / seconds
    print(f"\n{trials} trials of 210 units in 10 searches: {seconds:.1f} s, {speed:.0f} a second, {size:.0f} MB")
    print("\n| search_runs | ms |\n|---|---|")
    for name, value in search_times(uri).items():
        print(f"| {name} | {value:.0f} |")


def main() -> None:
    """Command line; the store lies in the working directory's file system."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20_000)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="throughput-", dir=Path.cwd()))
    try:
        report(arguments.trials, work)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
