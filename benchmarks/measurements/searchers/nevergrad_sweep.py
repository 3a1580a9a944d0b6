"""Which of Nevergrad's registered optimizers work on a compression space: run each, twice, with failures mixed in.

    python -m benchmarks.measurements.searchers.nevergrad_sweep sweep.jsonl

Each optimizer searches 12 units of 4 levels for 60 trials, of which every ninth fails, in a forked process of its own
with a time limit. A line a result; names already in the file are skipped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from evo_hpo import Budget, CompressionSpace, FunctionProblem, Unit, search
from evo_hpo.space.compression_space import Assignment
from searchers.foreign import nevergrad_adapter

TRIALS = 60


def _problem() -> FunctionProblem:
    space = CompressionSpace([Unit(f"u{i}", (2, 3, 4, 5)) for i in range(12)], budget=36)
    weights = np.random.default_rng(5).gamma(1.0, 1.0, 12)

    def loss(levels: Assignment) -> float:
        if sum(k * (i + 1) for i, k in enumerate(levels)) % 9 == 0:
            raise RuntimeError("fails on purpose")
        return float(sum(w * (3 - k) ** 2 for w, k in zip(weights, levels, strict=True)))

    return FunctionProblem(space, loss)


def _run(name: str, settings: dict[str, Any]) -> tuple[list[Assignment], float]:
    problem = _problem()
    cls = nevergrad_adapter._member(name)
    result = search(cls(problem.space, seed=3, **settings), problem, budget=Budget(evaluations=TRIALS))
    return [o.trial.levels for o in result.outcomes], result.best_loss


def _report(name: str, settings: dict[str, Any], pipe: Connection) -> None:
    start = time.perf_counter()
    try:
        first, best = _run(name, settings)
        seconds = time.perf_counter() - start
        again, _ = _run(name, settings)
        pipe.send({"ok": len(first) == TRIALS, "same": first == again, "best": best, "seconds": round(seconds, 3)})
    except BaseException as error:
        cause = error.__cause__ or error
        pipe.send({"ok": False, "error": f"{type(cause).__name__}: {cause}".split("\n")[0][:200]})


def main() -> None:
    """Sweeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--encoding", default=None)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for one optimizer")
    parser.add_argument("--stop-after", type=float, default=1e9, help="seconds after which to stop; run again to go on")
    arguments = parser.parse_args()
    written = arguments.output.read_text().splitlines() if arguments.output.exists() else []
    done = {json.loads(line)["name"] for line in written}
    context = multiprocessing.get_context("fork")
    start = time.perf_counter()
    settings = {} if arguments.encoding is None else {"encoding": arguments.encoding}
    for name in sorted(nevergrad_adapter.load().optimizers.registry):
        if name in done or time.perf_counter() - start > arguments.stop_after:
            continue
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=_report, args=(name, settings, there), daemon=True)
        child.start()
        there.close()
        row: dict[str, Any] = {"ok": False, "error": f"took more than {arguments.limit:g} s"}
        if here.poll(arguments.limit):
            try:
                row = here.recv()
            except EOFError:
                row = {"ok": False, "error": "the process died"}
        child.kill()
        child.join()
        with arguments.output.open("a") as file:
            file.write(json.dumps({"name": name, **row}) + "\n")


if __name__ == "__main__":
    main()
