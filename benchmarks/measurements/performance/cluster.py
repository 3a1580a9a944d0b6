"""What a batch costs over Ray, and how scoring scales with the number of scorers; extra `ray`.

Nodes are simulated on one machine: what takes time is a problem that sleeps, so that any number of scorers fits.

    python -m benchmarks.measurements.performance.cluster              # both tables
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import ray
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from evo_hpo.run.scorers import Scorers, connect
from evo_hpo.run.spread_problem import SpreadProblem
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.registry import make_problem

OFFSPRING = 128
STORE = 200_000_000
COUNTS = (1, 2, 4, 8, 16, 32, 64)
DELAY = 0.1


def main() -> None:
    """Prints the tables."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": COUNTS[-1], "object_store_memory": STORE})
    connect(cluster.address)
    try:
        console = Console()
        console.print(_overhead())
        console.print(_scaling())
    finally:
        ray.shutdown()
        cluster.shutdown()


def _overhead() -> Table:
    table = Table("scorers", "batch of 16, here (ms)", "over Ray (ms)", "more (ms)", title="noisy, 210 units")
    settings = {"units": 210}
    here = make_problem("noisy", **settings)
    batch = [here.space.sample(np.random.default_rng(i)) for i in range(16)]
    alone = _median(lambda: here.score(batch, Minibatch(0, 1024)))
    for count in (1, 2, 4):
        scorers = Scorers(count)
        spread = SpreadProblem(scorers, "noisy", settings)
        over = _median(lambda spread=spread: spread.score(batch, Minibatch(0, 1024)))  # type: ignore[misc]
        table.add_row(str(count), *(f"{1000 * s:.2f}" for s in (alone, over, over - alone)))
        scorers.close()
    return table


def _scaling() -> Table:
    table = Table("scorers", "seconds", "efficiency", title=f"{OFFSPRING} candidates of {1000 * DELAY:.0f} ms")
    settings = {"units": 30, "delay": DELAY}
    space = make_problem("noisy", units=30).space
    batch = [space.sample(np.random.default_rng(i)) for i in range(OFFSPRING)]
    for count in COUNTS:
        scorers = Scorers(count)
        spread = SpreadProblem(scorers, "noisy", settings)
        seconds = _median(lambda spread=spread: spread.score(batch, Minibatch(0, 1024)), 3)  # type: ignore[misc]
        table.add_row(str(count), f"{seconds:.2f}", f"{OFFSPRING * DELAY / count / seconds:.1%}")
        scorers.close()
    return table


def _median(work: Callable[[], object], repeats: int = 50) -> float:
    """Of so many timings, after two that are not counted (scorers make the problem when they are first asked)."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


if __name__ == "__main__":
    main()
