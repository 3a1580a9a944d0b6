"""Seconds inside ask and tell for each searcher, and the speed of the space's own operations.

    python -m benchmarks.measurements.searchers.overhead
    python -m benchmarks.measurements.searchers.overhead --searchers trust_region optuna:tpe --trials 10 100

The loss is a table look-up, so that what is timed is the search alone. Give it a machine with nothing else running, and
one thread (``OMP_NUM_THREADS=1``).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.problems.synthetic import interacting
from evo_hpo import Budget, CompressionSpace, search
from evo_hpo.search.budget import Ledger
from evo_hpo.search.loop import Checkpoint
from evo_hpo.search.registry import make_searcher
from evo_hpo.search.trial import Measured, Outcome
from searchers.evopress.mutation import Exchange, LevelSwitch, Uniforms, UnrestrictedSwitch
from searchers.moves import Moves

SEARCHERS = (
    *("random", "best_of_random", "local_search", "simulated_annealing", "genetic", "greedy", "dynamic_programming"),
    *("integer_programming", "trust_region", "evopress", "multi_step:random"),
    *(f"optuna:{name}" for name in ("random", "qmc", "nsga2", "cmaes", "tpe", "tpe_univariate", "gp")),
    *(f"nevergrad:{name}" for name in ("DiscreteOnePlusOne", "DiscreteLenglerOnePlusOne", "CMA", "NGOpt")),
    *("nevergrad:TwoPointsDE", "nevergrad:PSO"),
)


class _Cut(Exception):
    """A search took longer than its limit."""


class _Clock:
    """Observes a search, and cuts it off after ``limit`` seconds."""

    def __init__(self, limit: float) -> None:
        self.limit, self.made, self.start = limit, 0, time.perf_counter()
        self.seconds = 0.0

    def batch(self, outcomes: Sequence[Outcome], ledger: Ledger) -> None:
        self.made += len(outcomes)
        self.seconds = time.perf_counter() - self.start
        if self.seconds > self.limit:
            raise _Cut

    def probe(self, measured: Measured, ledger: Ledger) -> None:
        """Not timed."""

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        raise NotImplementedError


def overhead(
    name: str, units: int, trials: int, limit: float = math.inf, *, unequal: bool = True
) -> tuple[float, int, bool]:
    """Seconds inside ask and tell, the trials that were made, and whether ``limit`` (seconds) cut the search off.

    Of a search that was cut off, the seconds are those of its whole loop.
    """
    problem = interacting(units=units, unequal=unequal, seed=0)
    searcher = make_searcher(name, problem.space, seed=0)
    clock = _Clock(limit)
    try:
        result = search(searcher, problem, budget=Budget(evaluations=trials), observers=[clock])
    except _Cut:
        return clock.seconds, clock.made, True
    return result.searcher_seconds, clock.made, False


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
    moves = Moves(space)
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


def rate(unequal: bool, trials: int = 20_000) -> float:
    """Trials a second of EvoPress inside ask and tell, 210 units, one process; the best of three searches."""
    return max(trials / overhead("evopress", 210, trials, unequal=unequal)[0] for _ in range(3))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--searchers", nargs="*", default=SEARCHERS)
    parser.add_argument("--units", nargs="*", type=int, default=[30, 210])
    parser.add_argument("--trials", nargs="*", type=int, default=[10, 100, 1000])
    parser.add_argument(
        "--limit", type=float, default=120.0, metavar="SECONDS", help="cuts a search off, between batches (120)"
    )
    arguments = parser.parse_args()
    print("| operation, 210 units | microseconds |\n|---|---|")
    for name, seconds in space_operations().items():
        print(f"| {name} | {1e6 * seconds:.1f} |")
    print("\nEvoPress, 210 units, trials a second over 20 000 trials: ", end="")
    print(f"{rate(False):.0f} with units of equal size, {rate(True):.0f} with unequal ones.")
    columns = [(u, t) for u in arguments.units for t in arguments.trials]
    print("\nMilliseconds a trial inside ask and tell:\n")
    print("| searcher | " + " | ".join(f"{u} units, {t} trials" for u, t in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name in arguments.searchers:
        cells: list[str] = []
        cut = dict.fromkeys(arguments.units, False)
        for units, trials in columns:
            if cut[units]:
                cells.append("–")
                continue
            seconds, made, cut[units] = overhead(name, units, trials, arguments.limit)
            short = f" ({'cut at ' * cut[units]}{made})" if made < trials else ""
            cells.append(f"{1000 * seconds / max(made, 1):.2f}{short}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
