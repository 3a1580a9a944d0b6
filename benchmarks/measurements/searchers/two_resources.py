"""What two resources cost: milliseconds inside ask and tell a trial, and those of a repair, at 210 units.

    python -m benchmarks.measurements.searchers.two_resources [--searchers trust_region optuna:tpe] [--trials 100]

Units are SmolLM2's layers with five ggml types of one block size, in bytes and in nanoseconds a token; types that take
more bytes are not always slower. The budgets leave out about half of either range. "Exact" demands the whole first
budget. The loss is a look-up, so that what is timed is the search alone. Times are the processor's: what else runs on
the machine matters little. A second table is of ranges of the first budget, over its upper half.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np

from benchmarks.measurements.searchers.overhead import _Clock, _Cut
from benchmarks.problems.synthetic import Landscape, NoisyProblem
from evo_hpo import Budget, CompressionSpace, Unit, search
from evo_hpo.errors import EvoHpoError
from evo_hpo.search.registry import make_searcher
from evo_hpo.space.ranges import at, foot, spanning

TYPES = {"IQ4_NL": (18, 35), "Q4_1": (20, 51), "Q5_0": (22, 66), "Q5_1": (24, 65), "Q8_0": (34, 47)}
"""Bytes of a block of 32 weights, and picoseconds a weight on one core of an AMD EPYC."""

SHAPES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)} | {
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}

SEARCHERS = (
    *("uniform", "random", "best_of_random", "local_search", "simulated_annealing", "genetic", "greedy"),
    *("dynamic_programming", "integer_programming", "trust_region", "evopress", "multi_step:random", "fisher"),
    *("augmented_hessian", "curvature_region", "delta_loss", "gradient_threshold", "layerwise", "measured_greedy"),
    *("quadratic_surrogate", "zeroq"),
    *(f"optuna:{name}" for name in ("random", "qmc", "nsga2", "cmaes", "tpe", "tpe_univariate", "gp")),
    *(f"nevergrad:{name}" for name in ("DiscreteOnePlusOne", "DiscreteLenglerOnePlusOne", "CMA", "NGOpt")),
    *("nevergrad:TwoPointsDE", "nevergrad:PSO"),
)

FRONTS = (
    *("uniform", "curvature_front", "additive_front", "evopress_front", "optuna:nsga2", "optuna:tpe", "nevergrad:DE"),
    *("union:curvature_region", "union:evopress", "union:fisher", "union:local_search", "union:trust_region"),
)
"""Searchers of ranges."""


def space(resources: int = 2, *, exact: bool = False, blocks: int = 30) -> CompressionSpace:
    """All seven layers of each block, counted in bytes, or in bytes and nanoseconds a token."""
    units = []
    for block, (role, (outputs, inputs)) in itertools.product(range(blocks), SHAPES.items()):
        size = outputs * inputs
        rows_of = [(size // 32 * taken, size * speed // 1000) for taken, speed in TYPES.values()]
        costs = tuple(rows_of) if resources > 1 else tuple(row[0] for row in rows_of)
        units.append(Unit(f"layers.{block}.{role}", costs, levels=tuple(TYPES), size=size))
    limits = []
    for r in range(resources):
        rows = [[c[r] if isinstance(c, tuple) else c for c in unit.costs] for unit in units]
        limits.append((sum(min(row) for row in rows) + sum(max(row) for row in rows)) // 2)
    names = ("bytes", "nanoseconds")[:resources]
    found = CompressionSpace(units, limits, resources=names)
    if not exact:
        return found
    cost = found.cost(found.sample(np.random.default_rng(0)))
    return CompressionSpace(units, (cost, *limits[1:]), floor=(cost, *[0] * (resources - 1)), resources=names)


def ranged(of: CompressionSpace) -> CompressionSpace:
    """All budgets from the middle between the least cost and the budget on."""
    return spanning(at(of, (foot(of) + of.budget) // 2), of)


def problem(of: CompressionSpace) -> NoisyProblem:
    """Errors by level, gamma sensitivities and small pairwise terms; it has sensitivities."""
    rng = np.random.default_rng(0)
    errors = np.tile(4.0 ** -np.arange(len(TYPES)), (len(of), 1))
    sizes = np.array([unit.size for unit in of.units], dtype=float)
    pairs = rng.normal(0.0, 0.01, (len(of), len(of)))
    scape = Landscape(errors, rng.gamma(1.0, 1.0, len(of)) * sizes / sizes.mean(), pairs)
    return NoisyProblem(of, scape, noise=0.3)


def overhead(name: str, of: CompressionSpace, trials: int, limit: float) -> str:
    """Milliseconds a trial inside ask and tell, with what is worth saying about it."""
    with mock.patch.object(time, "perf_counter", time.process_time):
        clock = _Clock(limit)
        try:
            searcher = make_searcher(name, of, seed=0)
            result = search(searcher, problem(of), budget=Budget(tokens=1024 * trials), observers=[clock])
        except _Cut:
            return f"{1000 * clock.seconds / max(clock.made, 1):.2f} (cut at {clock.made})"
        except EvoHpoError as error:
            return f"refused: {error}"
    short = f" ({clock.made})" if clock.made < trials else ""
    assert all(of.feasible(outcome.trial.levels) for outcome in result.outcomes)
    return f"{1000 * result.searcher_seconds / max(clock.made, 1):.2f}{short}"


def repairs(of: CompressionSpace, count: int = 40) -> tuple[float, float]:
    """Median and longest repair of random wishes, milliseconds."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        wish = rng.uniform(0, 4, len(of)).tolist()
        found.append(_seconds(lambda wish=wish: of.repair(wish, rng)))  # type: ignore[misc]
    return 1000 * float(np.median(found)), 1000 * max(found)


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--searchers", nargs="*", default=SEARCHERS)
    parser.add_argument("--fronts", nargs="*", default=FRONTS)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--limit", type=float, default=60.0, metavar="SECONDS", help="cuts a search off (60)")
    arguments = parser.parse_args()
    spaces = {
        "one resource": space(1),
        "two resources": space(2),
        "two, the first exact": space(2, exact=True),
    }
    print("| | " + " | ".join(spaces) + " |\n|---|" + "---|" * len(spaces))
    cells = [f"{median:.2f} (at most {most:.2f})" for median, most in map(repairs, spaces.values())]
    print("| a repair | " + " | ".join(cells) + " |")
    _rows(arguments.searchers, list(spaces.values()), arguments)
    print("\n| over a range | one resource | two resources |\n|---|---|---|")
    _rows(arguments.fronts, [ranged(space(1)), ranged(space(2))], arguments)


def _rows(names: Sequence[str], spaces: Sequence[CompressionSpace], arguments: argparse.Namespace) -> None:
    for name in names:
        cells = [overhead(name, of, arguments.trials, arguments.limit) for of in spaces]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
