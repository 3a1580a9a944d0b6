"""What a batch costs over Ray, and how scoring scales with the number of scorers; extra `ray`.

Nodes are simulated on one machine: what takes time is a problem that sleeps, so that any number of scorers fits.

    python -m benchmarks.measurements.performance.cluster              # both tables
    python -m benchmarks.measurements.performance.cluster --smollm2    # what a batch costs on the real model; 3 GB
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from evo_hpo.run import scorers as on_cluster
from evo_hpo.run.scorers import Scorer, Scorers, connect
from evo_hpo.run.spread_problem import SpreadProblem
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.registry import make_problem

OFFSPRING = 128
STORE = 200_000_000
COUNTS = (1, 2, 4, 8, 16, 32, 64)
DELAY = 0.1


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", action="store_true", help="only the overhead on SmolLM2, whose levels are built")
    options = parser.parse_args(arguments)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": COUNTS[-1], "object_store_memory": STORE})
    connect(cluster.address)
    try:
        console = Console()
        for table in [_on_smollm2] if options.smollm2 else [_overhead, _scaling]:
            console.print(table())
    finally:
        ray.shutdown()
        cluster.shutdown()


class TimedScorer(Scorer):
    """Says from when to when it answered, by the clock that all processes of a machine share."""

    def __init__(self, cores: int) -> None:
        super().__init__(cores)
        self.span = (0.0, 0.0)

    def answer(self, name: str, settings: dict[str, Any], calls: Any, stores: Any = None) -> list[Any]:
        start = time.monotonic()
        found = super().answer(name, settings, calls, stores)
        self.span = (start, time.monotonic())
        return found

    def last(self) -> tuple[float, float]:
        """Start and end of the last answer, seconds."""
        return self.span


def _on_smollm2(batches: int = 11) -> Table:
    """A batch is one round: each scorer is asked once.

    Nobody scores: the batch's time less that in which any scorer answered, what Ray adds where scorers share cores.
    Less the longest answer: what it adds where each has its own; on fewer cores than scorers it counts turns, too.
    """
    os.environ["EVO_HPO_THREADS"] = "1"
    settings = {"memory": "packed", "held_out_tokens": 256, "calibration_tokens": 8192}
    columns = ("scorers", "batch of 16, here (s)", "over Ray (s)", "nobody scores (ms)", "less the longest answer (ms)")
    table = Table(*columns, title="SmolLM2, 256 tokens; medians, in brackets quartiles")
    here = make_problem("smollm2", **settings)
    batch = [here.space.sample(np.random.default_rng(i)) for i in range(16)]
    seeds = itertools.count()
    alone = _median(lambda: here.score(batch, Minibatch(next(seeds), 256)), batches)
    on_cluster.Scorer = TimedScorer  # type: ignore[misc]
    for count in (1, 2, 4):
        scorers = Scorers(count)
        spread = SpreadProblem(scorers, "smollm2", settings)
        times, idle, beside = [], [], []
        for _ in range(batches + 2):
            start = time.monotonic()
            spread.score(batch, Minibatch(next(seeds), 256))
            times.append(time.monotonic() - start)
            spans = sorted(ray.get([scorer.last.remote() for scorer in scorers._alive]))
            idle.append(1000 * (times[-1] - _covered(spans)))
            beside.append(1000 * (times[-1] - max(end - begin for begin, end in spans)))
        table.add_row(str(count), f"{alone:.2f}", f"{np.median(times[2:]):.2f}", _spread(idle[2:]), _spread(beside[2:]))
        scorers.close()
    return table


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds in which at least one of the spans, sorted by start, goes on."""
    total, until = 0.0, -np.inf
    for begin, end in spans:
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _spread(values: Sequence[float]) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


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
