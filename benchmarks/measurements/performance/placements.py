"""Levels kept packed, blocks kept in main memory: `python -m benchmarks.measurements.performance.placements`.

SmolLM2, with GPTQ levels unless told otherwise, each placement in a process of its own: seconds a candidate, and the
most memory that torch held on a GPU. Losses must be the same.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.problems.smollm2 import smollm2
from evo_hpo.scoring.placement import KINDS
from evo_hpo.search.problem import Minibatch

CANDIDATES = 16


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 2048], help="a candidate")
    parser.add_argument("--memory", nargs="+", default=list(KINDS), choices=KINDS, help="placements to measure")
    parser.add_argument(
        "--method", default="gptq", help="of the levels; rtn is built in seconds and takes as long to read"
    )
    options = parser.parse_args(arguments)
    settings = {"average": 3.0, "device": options.device, "dtype": options.dtype, "method": options.method}
    smollm2.prepare(settings, partial(print, flush=True))
    print(f"{options.device}, {options.dtype}, {CANDIDATES} offspring of the uniform 3 bits; torch {torch.__version__}")
    losses: dict[int, set[float]] = {}
    print(f"{'memory':12}{'tokens':>8}{'ms a candidate':>16}{'GB on the GPU':>15}  mean loss")
    for memory in options.memory:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            for tokens, seconds, held, loss in pool.apply(measured, (memory, settings, options.tokens)):
                print(f"{memory:12}{tokens:8}{1e3 * seconds:16.2f}{held / 1e9:15.2f}  {loss:.9f}", flush=True)
                losses.setdefault(tokens, set()).add(loss)
    if any(len(found) > 1 for found in losses.values()):
        raise SystemExit("placements differ in their losses")


def measured(memory: str, settings: Mapping[str, Any], sizes: Sequence[int]) -> list[tuple[int, float, int, float]]:
    """For each number of tokens: seconds a candidate of the second round, bytes held at most, mean loss."""
    problem, device = smollm2(**settings, memory=memory, early_stopping=False), settings["device"]
    switches = list(problem.space.switches(problem.space.uniform()))
    rows = []
    for tokens in sizes:
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        for seed in (0, 1):
            chosen = np.random.default_rng(seed).choice(len(switches), CANDIDATES, replace=False)
            offspring = [switches[int(number)] for number in chosen]
            start = time.perf_counter()
            scores = problem.score(offspring, Minibatch(seed, tokens))
            seconds = (time.perf_counter() - start) / CANDIDATES
        held = torch.cuda.max_memory_allocated() if device != "cpu" else 0
        rows.append((tokens, seconds, held, sum(score.loss for score in scores) / CANDIDATES))
    return rows


if __name__ == "__main__":
    main()
