"""Every searcher at equal evaluations on synthetic problems.

    python -m benchmarks.searchers.measure hits.jsonl --suite hits
    python -m benchmarks.searchers.measure equal.jsonl --suite equal --stop-after 200
    python -m benchmarks.searchers.table hits.jsonl

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

from benchmarks.synthetic import NoisyProblem
from evo_hpo import Budget, search
from evo_hpo.errors import EvoHpoError
from evo_hpo.problem import FunctionProblem
from evo_hpo.registry import make_problem, make_searcher

LINEUP: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "random": ("random", {}),
    "best_of_random": ("best_of_random", {}),
    "local_search": ("local_search", {}),
    "simulated_annealing": ("simulated_annealing", {}),
    "genetic": ("genetic", {}),
    "greedy": ("greedy", {}),
    "dynamic_programming": ("dynamic_programming", {}),
    "dynamic_programming, one solution": ("dynamic_programming", {"refine": False}),
    "trust_region": ("trust_region", {}),
    "evopress": ("evopress", {}),
    "evopress, as published": ("evopress", {"cross_group": 0.0}),
    "evopress, lambda 1": ("evopress", {"offspring": 1}),
    "evopress, restarts": ("evopress", {"widen_after": 5, "restart_after": 20}),
    "evopress, population 4": ("evopress", {"survivors": (4,)}),
    "evopress from dynamic_programming": ("evopress", {"init": "dynamic_programming"}),
    "evopress from trust_region": ("evopress", {"init": "trust_region"}),
    "optuna:tpe": ("optuna:tpe", {}),
    "optuna:cmaes": ("optuna:cmaes", {}),
    "nevergrad:DiscreteLenglerOnePlusOne": ("nevergrad:DiscreteLenglerOnePlusOne", {}),
    "nevergrad:NGOpt": ("nevergrad:NGOpt", {}),
}
"""Label -> searcher and settings; other libraries' with their default encodings."""

DROP = {"levels": 2, "exact": True}
HITS: dict[str, tuple[str, dict[str, Any]]] = {
    "8008, 0.1": ("interacting", {"units": 16, "tightness": 0.375, "interaction": 0.1, **DROP}),
    "8008, 0.35": ("interacting", {"units": 16, "tightness": 0.375, "interaction": 0.35, **DROP}),
    "125970, 0.1": ("interacting", {"units": 20, "tightness": 0.4, "interaction": 0.1, **DROP}),
    "125970, 0.35": ("interacting", {"units": 20, "tightness": 0.4, "interaction": 0.35, **DROP}),
}
"""Dropping 6 of 16 and 8 of 20 modules: number of assignments, standard deviation of the pairwise terms."""

EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "additive 60": ("additive", {"units": 60}),
    "interacting 30": ("interacting", {"units": 30}),
    "interacting 30 tight": ("interacting", {"units": 30, "tightness": 0.8}),
    "interacting 60": ("interacting", {"units": 60}),
    "interacting 60 unequal": ("interacting", {"units": 60, "unequal": True}),
    "non-monotone 60": ("non_monotone", {"units": 60}),
    "noisy 60": ("noisy", {"units": 60, "noise": 0.3}),
    "interacting 210 unequal": ("interacting", {"units": 210, "unequal": True, "structure": 0.5, "interaction": 0.05}),
}
"""Five levels, 60 % of the range of costs unpaid, pairwise terms of standard deviation 0.1 unless said otherwise."""

SUITES: dict[str, tuple[dict[str, tuple[str, dict[str, Any]]], int, int]] = {
    "hits": (HITS, 800, 20),
    "equal": (EQUAL, 600, 10),
}
"""Problems, evaluations, seeds."""


def measure(problem: str, label: str, seed: int, suite: str) -> dict[str, Any]:
    """One run: its noise-free loss, uniform's, the optimum where known, seconds inside ask and tell."""
    problems, evaluations, _ = SUITES[suite]
    name, settings = problems[problem]
    made = make_problem(name, seed=seed, **settings)
    assert isinstance(made, (FunctionProblem, NoisyProblem))
    searcher_name, searcher_settings = LINEUP[label]
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
    parser.add_argument("--searchers", nargs="*", default=list(LINEUP), choices=list(LINEUP), metavar="LABEL")
    parser.add_argument("--problems", nargs="*", default=None)
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds")
    arguments = parser.parse_args()
    problems, _, seeds = SUITES[arguments.suite]
    done = set()
    if arguments.file.exists():
        rows = map(json.loads, arguments.file.read_text().splitlines())
        done = {(r["problem"], r["searcher"], r["seed"]) for r in rows}
    start = time.perf_counter()
    chosen = arguments.problems or list(problems)
    for seed, problem, label in itertools.product(range(arguments.seeds or seeds), chosen, arguments.searchers):
        if (problem, label, seed) in done:
            continue
        if time.perf_counter() - start > arguments.stop_after:
            print("stopped; run again to go on")
            return
        row = measure(problem, label, seed, arguments.suite)
        with arguments.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
