"""Optimizers of Optuna and Nevergrad under every encoding, on synthetic problems with pairwise terms.

    python -m benchmarks.encodings.measure results.jsonl --searchers optuna:cmaes nevergrad:DE --encodings repaired keys
    python -m benchmarks.encodings.table results.jsonl

Each run's instance is drawn from its seed. A line a run; what the file holds already is skipped, so a measurement that
was stopped (``--stop-after`` seconds) goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.synthetic import interacting
from evo_hpo import Budget, FunctionProblem, search
from evo_hpo.errors import EvoHpoError, InvalidSettingError
from searchers import make_searcher

PROBLEMS: dict[str, dict[str, Any]] = {
    "60": {"units": 60, "unequal": False},
    "60 unequal": {"units": 60, "unequal": True},
    "210": {"units": 210, "levels": 7, "unequal": False},
}
"""Problems by name: units of equal or unequal size, 5 levels (210 units: 7), 60 % of the range of costs unpaid."""

REFERENCE = 20_000  # evaluations of the searches that say what the best known loss is


@cache
def instance(problem: str, seed: int) -> tuple[FunctionProblem, float, float]:
    """A problem's instance, the loss of uniform compression and the best loss known."""
    made = interacting(seed=seed, **PROBLEMS[problem])
    best = math.inf
    for name, settings in (("evopress", {"offspring": 4}), ("evopress", {"offspring": 4, "restart_after": 200})):
        found = search(make_searcher(name, made.space, seed=99, **settings), made, budget=Budget(evaluations=REFERENCE))
        best = min(best, found.best_loss)
    return made, made.function(made.space.uniform()), best


def measure(problem: str, searcher: str, encoding: str, seed: int, evaluations: int, more: dict[str, Any]) -> Any:
    """One run: gap of its best loss (0: best known, 100: uniform) and milliseconds a trial inside ask and tell."""
    made, uniform, best = instance(problem, seed)
    settings = {**more, **({} if encoding == "-" else {"encoding": encoding})}
    result = search(
        make_searcher(searcher, made.space, seed=seed, **settings), made, budget=Budget(evaluations=evaluations)
    )
    return {
        "gap": 100 * (result.best_loss - best) / (uniform - best),
        "trials": len(result.outcomes),
        "milliseconds": 1000 * result.searcher_seconds / len(result.outcomes),
    }


def main() -> None:
    """Measures what is asked for and not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--problems", nargs="+", default=["60"], choices=list(PROBLEMS))
    parser.add_argument("--searchers", nargs="+", required=True)
    parser.add_argument("--encodings", nargs="+", default=["-"], help="- is the searcher's default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=1000)
    parser.add_argument("--settings", type=json.loads, default={}, help="further settings, as JSON")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds")
    arguments = parser.parse_args()
    keys = ("problem", "searcher", "encoding", "seed", "evaluations", "settings")
    lines = arguments.output.read_text().splitlines() if arguments.output.exists() else []
    done = {json.dumps([json.loads(line)[k] for k in keys]) for line in lines}
    start = time.perf_counter()
    for seed, problem, searcher, encoding in itertools.product(
        range(arguments.seeds), arguments.problems, arguments.searchers, arguments.encodings
    ):
        run = (problem, searcher, encoding, seed, arguments.evaluations, arguments.settings)
        if json.dumps(list(run)) in done or time.perf_counter() - start > arguments.stop_after:
            continue
        try:
            row = measure(*run)
        except InvalidSettingError as error:
            if "encoding=" in str(error):  # this library has no such encoding
                continue
            row = {"error": str(error)}
        except EvoHpoError as error:
            row = {"error": str(error)}
        with arguments.output.open("a") as file:
            file.write(json.dumps({**dict(zip(keys, run, strict=True)), **row}) + "\n")


if __name__ == "__main__":
    main()
