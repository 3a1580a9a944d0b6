"""Generations that EvoPress needs to the optimum of a linear loss, against the theory's k(n - k) / lambda.

    python -m benchmarks.measurements.searchers.generations --plot generations.svg

Drop k of n modules, each with its own loss; the optimum drops the k smallest. The EvoPress paper (arXiv 2410.14649,
theorem 1) bounds the expected generations by a constant times k(n - k) / lambda.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from evo_hpo import Allowance, CompressionSpace, Outcome, Unit
from searchers.evopress.evopress import EvoPress

CASES = ((10, 5), (20, 5), (20, 10), (50, 12), (50, 25), (100, 25), (100, 50), (200, 50), (200, 100))
"""n and k."""

MOST = 50  # times k(n - k) / lambda, after which a search is given up


def generations(n: int, k: int, offspring: int, seed: int) -> int:
    """Generations until the parent is the optimum, from a random start."""
    space = CompressionSpace([Unit(f"m{i}", (0, 1)) for i in range(n)], n - k, floor=n - k)
    losses = np.random.default_rng([seed, n, k]).permutation(n) + 1.0
    optimum = float(np.sort(losses)[:k].sum())
    published: dict[str, Any] = {"init": "random", "cross_group": 0.0, "minibatch": "fixed", "revisit": True}
    searcher = EvoPress(space, seed=seed, offspring=offspring, **published)
    best, count = float("inf"), 0
    while best > optimum:
        trials = searcher.ask(Allowance())
        if not trials or count > MOST * k * (n - k) / offspring + 100:
            raise RuntimeError(f"n={n}, k={k}, seed={seed}: the optimum was not found in {count} generations")
        scored = [float(losses[np.array(t.levels) == 0].sum()) for t in trials]
        searcher.tell([Outcome(t, loss) for t, loss in zip(trials, scored, strict=True)])
        best, count = min(best, *scored), count + 1
    return count


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--offspring", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--plot", type=Path, help="picture to write")
    arguments = parser.parse_args()
    points: dict[int, list[tuple[float, float]]] = {}
    print("| n | k | lambda | mean generations | k(n-k)/lambda | ratio |\n|---|---|---|---|---|---|")
    for offspring in arguments.offspring:
        for n, k in CASES:
            mean = float(np.mean([generations(n, k, offspring, s) for s in range(arguments.seeds)]))
            bound = k * (n - k) / offspring
            points.setdefault(offspring, []).append((bound, mean))
            print(f"| {n} | {k} | {offspring} | {mean:.1f} | {bound:.1f} | {mean / bound:.2f} |", flush=True)
    if arguments.plot:
        plot(points, arguments.plot)


def plot(points: dict[int, list[tuple[float, float]]], path: Path) -> None:
    """Mean generations over the bound, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for offspring, pairs in points.items():
        x, y = zip(*sorted(pairs), strict=True)
        axes.loglog(x, y, "o-", label=f"λ = {offspring}")
    bounds = [bound for pairs in points.values() for bound, _ in pairs]
    ends = [min(bounds), max(bounds)]
    axes.loglog(ends, ends, "k--", label="k(n − k) / λ")
    axes.set_xlabel("k(n − k) / λ")
    axes.set_ylabel("mean generations to the optimum")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
