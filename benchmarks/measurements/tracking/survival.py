"""Kills searches and their tracking at random moments, resumes them, and looks for anything lost or doubled.

    python -m benchmarks.measurements.tracking.survival --kills 20
    python -m benchmarks.measurements.tracking.survival --full-disk       # as root: mounts a small tmpfs

Each round starts a real search process with its background writer, on a fresh store (so that some kills fall into the
database's creation) or on one that is made before, kills the search, the writer or both with SIGKILL after a random
time, and resumes. At the end the journal must equal that of an uninterrupted search, trial for trial, and MLflow must
hold exactly those trials. Needs psutil (in the extra `measurements`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.problems.synthetic import NoisyProblem, noisy
from evo_hpo.record.journal import Journal, read_journal, search_header
from evo_hpo.search.budget import Budget
from evo_hpo.search.loop import search
from evo_hpo.search.problem import Minibatch, Score
from evo_hpo.search.registry import make_searcher
from evo_hpo.search.trial import Outcome
from evo_hpo.space.compression_space import Assignment
from evo_hpo.tracking import BackgroundTracker, default_uri, track
from evo_hpo.tracking.mlflow_store import prepare_store

MODULE = "benchmarks.measurements.tracking.survival"
EVALUATIONS = 600
KILLS_A_STORE = 5


class Slow(NoisyProblem):
    """The noisy synthetic problem, with time to be killed in."""

    seconds = 0.0

    def score(
        self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None
    ) -> Sequence[Score]:
        time.sleep(self.seconds * len(assignments))
        return super().score(assignments, minibatch, keep=keep)


def run_search(folder: Path, seconds: float, *, tracked: bool) -> None:
    """One search of the campaign, resumed if there is anything to resume."""
    base = noisy()
    problem = Slow(base.space, base.landscape, noise=base.noise, tokens=base.tokens)
    problem.seconds = seconds
    budget = Budget(evaluations=EVALUATIONS)
    header = search_header("evopress-s0", "evopress", problem, budget, checkpoints=(0.5, 1.0))
    searcher = make_searcher("evopress", problem.space, seed=0, offspring=8, survivors=(3, 1), tokens=(512, 2048))

    def run() -> None:
        path = folder / "journals" / "evopress-s0.jsonl"
        with Journal.open(path, header, resume=True) as journal:
            search(searcher, problem, budget=budget, journal=journal, checkpoints=(0.5, 1.0))

    if not tracked:
        run()
        return
    with BackgroundTracker(folder):
        run()


def child(folder: Path, seconds: float) -> list[str]:
    """The command that runs the search in a process of its own."""
    return [sys.executable, "-m", MODULE, "--child", str(folder), "--seconds", str(seconds)]


def kill_one(folder: Path, seconds: float, rng: np.random.Generator) -> dict[str, Any]:
    """Starts the search, kills something of it after a random time and the rest later; says what and when."""
    victim = str(rng.choice(("both", "both", "search", "writer")))
    wait = float(rng.uniform(0.2, 9.0))
    process = subprocess.Popen(child(folder, seconds), stderr=subprocess.DEVNULL)
    time.sleep(wait)
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    if victim in ("both", "writer"):
        kill(p.pid for p in family)
    if victim == "writer":  # the search goes on without it for a while
        time.sleep(float(rng.uniform(0.2, 2.0)))
    kill([process.pid])
    process.wait()
    psutil.wait_procs(family, timeout=60)
    journal = folder / "journals" / "evopress-s0.jsonl"
    trials = len(read_journal(journal).outcomes) if journal.exists() and journal.stat().st_size else 0
    store = folder.parent.parent / "mlflow.db"
    return {"victim": victim, "after_s": round(wait, 2), "trials": trials, "store": store.exists()}


def kill(processes: Iterable[int]) -> None:
    """SIGKILL to each that is alive."""
    for number in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def values(outcomes: Sequence[Outcome]) -> list[tuple[Any, ...]]:
    """All of an outcome but its time."""
    return [(o.trial, o.loss, o.tokens, o.minibatch, o.status) for o in outcomes]


def verdict(folder: Path, reference: Path) -> dict[str, Any]:
    """Compares journal and store with the uninterrupted search."""
    expected = values(read_journal(reference / "journals" / "evopress-s0.jsonl").outcomes)
    found = values(read_journal(folder / "journals" / "evopress-s0.jsonl").outcomes)
    with sqlite3.connect(folder.parent.parent / "mlflow.db") as database:
        names = [n for (n,) in database.execute("SELECT name FROM runs WHERE name LIKE '% t%' ORDER BY name")]
        losses = dict(
            database.execute(
                "SELECT r.name, m.value FROM runs r JOIN metrics m ON m.run_uuid = r.run_uuid WHERE m.key LIKE 'loss%'"
            )
        )
        running = database.execute("SELECT count(*) FROM runs WHERE status = 'RUNNING'").fetchone()[0]
        parents = database.execute("SELECT count(*) FROM tags WHERE key = 'kind' AND value = 'search'").fetchone()[0]
        integrity = database.execute("PRAGMA integrity_check").fetchone()[0]
    wanted = {f"evopress s0 t{t[0].number:04d}": t[1] for t in expected}
    return {
        "journal_equal": found == expected,
        "trials": len(expected),
        "tracked": len(names),
        "lost": len(set(wanted) - set(names)),
        "twice": len(names) - len(set(names)),
        "losses_equal": losses == wanted,
        "running": running,
        "parents": parents,
        "integrity": integrity,
    }


def campaign(kills: int, seconds: float, seed: int) -> bool:
    """Runs all rounds; prints one JSON line a kill and one a store."""
    rng = np.random.default_rng(seed)
    work = Path(tempfile.mkdtemp(prefix="survival-"))
    reference = work / "reference"
    run_search(reference, 0.0, tracked=False)
    good = True
    for store in range(-(-kills // KILLS_A_STORE)):
        folder = work / f"{store}" / "mlruns" / "comparisons" / "survival"
        if store % 2:  # half of the kills fall into the creation of the database, half into tracking
            prepare_store(default_uri(folder))
        for _ in range(min(KILLS_A_STORE, kills - store * KILLS_A_STORE)):
            print(json.dumps(kill_one(folder, seconds, rng)), flush=True)
        run_search(folder, 0.0, tracked=True)
        track(folder)
        result = verdict(folder, reference)
        good &= result["journal_equal"] and result["losses_equal"] and result["integrity"] == "ok"
        good &= not (result["lost"] or result["twice"] or result["running"]) and result["parents"] == 1
        print(json.dumps(result), flush=True)
    shutil.rmtree(work)
    return bool(good)


def full_disk(size: str = "1000k") -> bool:
    """A search and its store on a disk that fills up, then has room again."""
    work = Path(tempfile.mkdtemp(prefix="full-disk-"))
    run_search(work / "reference", 0.0, tracked=False)
    disk = work / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
    try:
        folder = disk / "mlruns" / "comparisons" / "survival"
        prepare_store(default_uri(folder))
        done = subprocess.run(child(folder, 0.005), capture_output=True, text=True, check=False)
        print(json.dumps({"code": done.returncode, "says": done.stderr.strip().splitlines()[-3:]}))
        kept = read_journal(folder / "journals" / "evopress-s0.jsonl")
        print(json.dumps({"kept_trials": len(kept.outcomes), "free": shutil.disk_usage(disk).free}), flush=True)
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        run_search(folder, 0.0, tracked=True)
        track(folder)
        result = verdict(folder, work / "reference")
        print(json.dumps(result), flush=True)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
        shutil.rmtree(work)
    return bool(done.returncode and result["journal_equal"] and result["losses_equal"] and not result["running"])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.03, help="scoring time of a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full-disk", action="store_true")
    parser.add_argument("--child", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        run_search(arguments.child, arguments.seconds, tracked=True)
        return 0
    good = full_disk() if arguments.full_disk else campaign(arguments.kills, arguments.seconds, arguments.seed)
    print("nothing lost, nothing twice, nothing left running" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
