"""What sensitivities cost and what they foretell: `python -m benchmarks.measurements.sensitivities`.

On SmolLM2, with GPTQ levels unless told otherwise: the time of a pass beside that of scoring one assignment; predicted
against measured changes of one unit alone, at uniform 3 and 5 bits (`--picture FILE` draws them); and the exact
knapsack over the curvature at the uncompressed model.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.problems.smollm2 import smollm2
from evo_hpo.scoring.language_model_problem import LanguageModelProblem
from evo_hpo.scoring.sensitivities import SensitivityPass
from evo_hpo.search.problem import Minibatch
from evo_hpo.space.compression_space import Assignment
from searchers.additive.solvers import solve

LENGTH = 256

Changes = Mapping[str, NDArray[np.float64]]
"""Changes of the loss (nats a token, below 0 is better) of the moves that were tried: measured, and each prediction."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one table for each part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["time", "one-shot", "moves"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", help="or cuda")
    parser.add_argument(
        "--method", default="gptq", help="of the levels; rtn is built in seconds and takes as long to read"
    )
    parser.add_argument("--threads", type=int, default=1, help="cores of scoring and of a pass")
    parser.add_argument("--average", type=float, default=3.0)
    parser.add_argument("--sequences", type=int, default=16, help="of the timed pass and of the predicted moves")
    parser.add_argument("--one-shot", type=int, nargs="+", default=[8, 32], help="sequences of the one-shot solutions")
    parser.add_argument("--moves", type=int, default=40, help="changes of one unit that are measured at each reference")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 5], help="uniform references of the moves")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="scatter plot of the moves to write")
    options = parser.parse_args(arguments)
    os.environ["EVO_HPO_THREADS"] = str(options.threads)
    settings = {"average": options.average, "dtype": options.dtype, "device": options.device, "method": options.method}
    settings |= {"held_out_tokens": 4096, "tokens": LENGTH}
    smollm2.prepare(settings, partial(print, flush=True))
    problem = smollm2(**settings)
    place = f"{options.device} x {options.threads}, {options.dtype}"
    print(f"{problem.name}, {place}, {options.average} bits, load {os.getloadavg()[0]:.2f}", flush=True)
    if "time" in options.parts:
        timed(problem, options.sequences, options.rounds)
    if "one-shot" in options.parts:
        for sequences in options.one_shot:
            one_shot(problem, sequences)
    if "moves" in options.parts:
        found = {bits: moves(problem, bits, options.sequences, options.moves) for bits in options.bits}
        if options.picture:
            scatter(found, options.picture)


def timed(problem: LanguageModelProblem, sequences: int, rounds: int) -> None:
    """A pass beside scoring one assignment, in turns; levels are decoded and the dense side is there for both.

    Once more without the squares of a sequence's parts: what first order and curvature by sequence take alone.
    """
    minibatch, uniform = Minibatch(0, sequences * LENGTH), problem.space.uniform()
    problem.score([tuple(0 for _ in uniform)], minibatch)
    problem.sensitivities(None, minibatch)
    for number in range(rounds):
        others = np.random.default_rng(number).integers(5, size=len(uniform)).tolist()  # never scored before
        start = time.perf_counter()
        problem.score([tuple(others)], minibatch)
        scored = time.perf_counter()
        problem.sensitivities(None, minibatch)
        passed = time.perf_counter()
        with mock.patch.object(SensitivityPass, "_parted", return_value=False):
            problem.sensitivities(None, minibatch)
        scoring, whole, bare = scored - start, passed - scored, time.perf_counter() - passed
        print(
            f"{sequences} sequences of {LENGTH}: scoring {scoring:.2f} s, a pass {whole:.2f} s, ratio"
            f" {whole / scoring:.2f}; without parts {bare:.2f} s, ratio {bare / scoring:.2f}; load"
            f" {os.getloadavg()[0]:.2f}",
            flush=True,
        )


def one_shot(problem: LanguageModelProblem, sequences: int) -> None:
    """Held-out KL of the solution of the additive model that the curvature is."""
    found = problem.sensitivities(None, Minibatch(0, sequences * LENGTH))
    best = solve(problem.space, found.effects().tolist())
    assert best is not None
    own, uniform = (problem.validate(a)["loss"] for a in (best, problem.space.uniform()))
    print(f"one shot, {found.tokens} tokens charged: held-out KL {own:.4f}, uniform {uniform:.4f}", flush=True)


def moves(problem: LanguageModelProblem, bits: int, sequences: int, count: int) -> Changes:
    """Rank correlation of predicted and measured changes of the loss, on the same sequences; and the changes."""
    minibatch, rng = Minibatch(1, sequences * LENGTH), np.random.default_rng(0)
    labels = [unit.levels for unit in problem.space.units]
    at: Assignment = tuple(own.index(str(bits)) for own in labels)
    first, second = problem.sensitivities(at, minibatch, kind="kl"), problem.sensitivities(at, minibatch)
    chosen = [(int(u), int(rng.choice([k for k in range(5) if k != at[u]]))) for u in rng.permutation(len(at))[:count]]
    scores = problem.score([at, *[(*at[:u], k, *at[u + 1 :]) for u, k in chosen]], minibatch)
    measured = np.array([s.loss - scores[0].loss for s in scores[1:]])
    rows, columns = np.array(chosen).T
    predicted = {
        "first order": first.effects()[rows, columns],
        "curvature": second.effects()[rows, columns],
        "both": (first.effects() + second.effects())[rows, columns],
    }
    for name, values in predicted.items():
        print(f"at {bits} bits, {name}: rank correlation {spearmanr(values, measured).statistic:.3f}", flush=True)
    print("unit level measured first_order curvature")
    for i, (unit, level) in enumerate(chosen):
        own = f"{predicted['first order'][i]:+.2e} {predicted['curvature'][i]:+.2e}"
        print(f"{problem.space.units[unit].name} {labels[unit][level]} {measured[i]:+.2e} {own}", flush=True)
    return {"measured": measured, **predicted}


def scatter(found: Mapping[int, Changes], path: Path) -> None:
    """A panel for each reference: measured over predicted change, each prediction with its rank correlation."""
    figure = Figure(figsize=(4.6 * len(found), 4.2), layout="constrained")
    for axes, (bits, changes) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        measured = changes["measured"]
        for name, marker in (("first order", "x"), ("curvature", "+"), ("both", "o")):
            rank = spearmanr(changes[name], measured).statistic
            axes.scatter(changes[name], measured, s=22, marker=marker, label=f"{name}: rank correlation {rank:.2f}")
        width = float(np.abs(np.concatenate(list(changes.values()))).max()) * 1.1
        axes.plot([-width, width], [-width, width], "k--", linewidth=0.8)
        for scale in (axes.set_xscale, axes.set_yscale):
            scale("symlog", linthresh=10.0 ** np.floor(np.log10(width)) / 10)
        axes.set(title=f"uniform {bits} bits, one unit moved", xlabel="predicted change of the KL, nats a token")
        axes.set_ylabel("measured change, nats a token")
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
