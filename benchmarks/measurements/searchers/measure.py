"""Every searcher, and every encoding, at equal evaluations on synthetic problems.

    python -m benchmarks...searchers.measure hits.jsonl --suite hits
    python -m benchmarks...searchers.measure equal.jsonl --suite equal --stop-after 200
    python -m benchmarks...searchers.measure equal.jsonl --suite equal --searchers nevergrad: --problems "additive 30"
    python -m benchmarks...searchers.measure more.jsonl --suite hits --searchers evopress --seeds 400 100
    python -m benchmarks...searchers.table hits.jsonl

A line a run; runs that the file holds already are skipped, so a measurement that was stopped goes on where it was.
Each seed draws its own instance of a problem and seeds the searcher. Reported is the noise-free loss of what the
searcher recommends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

from benchmarks.measurements.searchers.lineup import SUITES
from benchmarks.problems.synthetic import NoisyProblem
from evo_hpo import Budget, search
from evo_hpo.errors import EvoHpoError
from evo_hpo.search.problem import FunctionProblem
from evo_hpo.search.registry import make_problem, make_searcher


def measure(problem: str, label: str, seed: int, suite: str, evaluations: int | None = None) -> dict[str, Any]:
    """One run: its noise-free loss, uniform's, the optimum where known, seconds inside ask and tell."""
    evaluations = evaluations or SUITES[suite].evaluations
    name, settings = SUITES[suite].problems[problem]
    made = make_problem(name, seed=seed, **settings)
    assert isinstance(made, (FunctionProblem, NoisyProblem))
    searcher_name, searcher_settings = SUITES[suite].searchers[label]
    row: dict[str, Any] = {"suite": suite, "problem": problem, "searcher": label, "seed": seed}
    start = time.perf_counter()
    try:
        searcher = make_searcher(searcher_name, made.space, seed=seed, **searcher_settings)
        result = search(searcher, made, budget=Budget(evaluations=evaluations), seed=seed)
    except EvoHpoError as error:
        return row | {"loss": None, "reason": f"{type(error).__name__}: {error}"}
    loss = math.nan if result.best is None else made.validate(result.best)["loss"]
    return row | {
        "loss": loss,
        "uniform": made.validate(made.space.uniform())["loss"],
        "optimum": made.optimum,
        "evaluations": len(result.outcomes),
        "overhead": result.searcher_seconds,
        "seconds": time.perf_counter() - start,
        "stop": result.stop_reason,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--suite", choices=SUITES, default="hits")
    parser.add_argument("--searchers", nargs="*", default=[""], metavar="START", help="labels that start so")
    parser.add_argument("--problems", nargs="*", default=[""], metavar="START", help="labels that start so")
    parser.add_argument("--evaluations", type=int, help="of each run, instead of the suite's (into a file of its own)")
    parser.add_argument("--seeds", nargs=2, type=int, metavar=("FIRST", "COUNT"), help="instead of the suite's")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds")
    arguments = parser.parse_args()
    suite = SUITES[arguments.suite]
    done = set()
    if arguments.file.exists():
        rows = map(json.loads, arguments.file.read_text().splitlines())
        done = {(r["problem"], r["searcher"], r["seed"]) for r in rows if r["suite"] == arguments.suite}
    start = time.perf_counter()
    problems = [p for p in suite.problems if p.startswith(tuple(arguments.problems))]
    searchers = [s for s in suite.searchers if s.startswith(tuple(arguments.searchers))]
    first, count = arguments.seeds or (0, suite.seeds)
    for seed, problem, label in itertools.product(range(first, first + count), problems, searchers):
        if (problem, label, seed) in done or (not arguments.seeds and seed >= suite.seeds_of(label)):
            continue
        if time.perf_counter() - start > arguments.stop_after:
            print("stopped; run again to go on")
            return
        row = measure(problem, label, seed, arguments.suite, arguments.evaluations)
        with arguments.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
