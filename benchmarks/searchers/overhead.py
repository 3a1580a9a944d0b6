"""Seconds inside ask and tell for each searcher, and the speed of the space's own operations.

    python -m benchmarks.searchers.overhead
    python -m benchmarks.searchers.overhead --searchers trust_region optuna:tpe --trials 10 100

The loss is a table look-up, so that what is timed is the search alone. One thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from benchmarks.synthetic import interacting
from evo_hpo import Budget, CompressionSpace, search
from evo_hpo.registry import make_searcher
from searchers.exchange import Exchanges
from searchers.mutation import Exchange, LevelSwitch, Uniforms, UnrestrictedSwitch

SEARCHERS = (
    "random",
    "best_of_random",
    "local_search",
    "simulated_annealing",
    "genetic",
    "greedy",
    "dynamic_programming",
    "integer_programming",
    "trust_region",
    "evopress",
    "multi_step:random",
    "optuna:random",
    "optuna:qmc",
    "optuna:nsga2",
    "optuna:cmaes",
    "optuna:tpe",
    "optuna:tpe_univariate",
    "optuna:gp",
    "nevergrad:DiscreteOnePlusOne",
    "nevergrad:DiscreteLenglerOnePlusOne",
    "nevergrad:CMA",
    "nevergrad:NGOpt",
    "nevergrad:TwoPointsDE",
    "nevergrad:PSO",
)
SLOW = 60.0  # seconds of one search, above which the next longer one is left out


def overhead(name: str, units: int, trials: int) -> tuple[float, int]:
    """Seconds inside ask and tell, and the trials that were made."""
    problem = interacting(units=units, unequal=True, seed=0)
    searcher = make_searcher(name, problem.space, seed=0)
    result = search(searcher, problem, budget=Budget(evaluations=trials))
    return result.searcher_seconds, len(result.outcomes)


def _time(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def space_operations() -> dict[str, float]:
    """Seconds of each operation on 210 units of 5 levels and unequal size."""
    space = interacting(units=210, unequal=True, seed=0).space
    data, start, rng = space.to_json(), space.uniform(), np.random.default_rng(0)
    wishes = [rng.uniform(0, 4, 210).tolist() for _ in range(20)]
    moves = Exchanges(space)
    switch, exchange, unrestricted = LevelSwitch(space), Exchange(space), UnrestrictedSwitch(space)
    stream = Uniforms(rng)
    space.sample(rng)
    return {
        "construction": _time(lambda: CompressionSpace(space.units, space.budget), 20),
        "count": _time(lambda: CompressionSpace(space.units, space.budget).count(), 3),
        "from JSON": _time(lambda: CompressionSpace.from_json(data), 5),
        "feasibility and cost": _time(lambda: (space.feasible(start), space.cost(start)), 2000),
        "uniform sample": _time(lambda: space.sample(rng), 50),
        "level switch within a group": _time(lambda: switch(start, stream, 1), 5000),
        "switch across groups": _time(lambda: exchange(start, stream, 1), 5000),
        "switch without groups": _time(lambda: unrestricted(start, stream, 1), 5000),
        "random exchange (local search)": _time(lambda: moves.random(start, rng), 500),
        "repair": _time(lambda: [space.repair(w, rng, fill=True) for w in wishes], 5) / len(wishes),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--searchers", nargs="*", default=SEARCHERS)
    parser.add_argument("--units", nargs="*", type=int, default=[30, 210])
    parser.add_argument("--trials", nargs="*", type=int, default=[10, 100, 1000])
    arguments = parser.parse_args()
    print("| operation, 210 units | microseconds |\n|---|---|")
    for name, seconds in space_operations().items():
        print(f"| {name} | {1e6 * seconds:.1f} |")
    columns = [(u, t) for u in arguments.units for t in arguments.trials]
    print("\nMilliseconds a trial inside ask and tell:\n")
    print("| searcher | " + " | ".join(f"{u} units, {t} trials" for u, t in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name in arguments.searchers:
        cells: list[str] = []
        slow = dict.fromkeys(arguments.units, False)
        for units, trials in columns:
            if slow[units]:
                cells.append("–")
                continue
            seconds, made = overhead(name, units, trials)
            slow[units] = seconds > SLOW / 10
            cells.append(f"{1000 * seconds / max(made, 1):.2f}" + (f" ({made})" if made < trials else ""))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
