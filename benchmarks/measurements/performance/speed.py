"""Seconds a candidate of each way, side by side, and where the evaluator's time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measurements.performance.evaluator_parts import RoundedLevels
from benchmarks.measurements.performance.ways import Job, Setup, Way
from evo_hpo.models.structure import decoder_blocks
from evo_hpo.search.problem import Minibatch


@dataclass(frozen=True)
class SpeedPlan:
    """What is timed.

    Attributes:
        offspring: candidates that the evaluator scores, of all that one parent gave.
        sample: candidates, drawn at random, that each slower way scores; every candidate costs it the same.
        rounds: the tokens are split into so many minibatches; the ways take turns.
        twice: time the slower ways before and after the evaluators of a round, not only before.
        evaluators: kinds of evaluator, see :data:`benchmarks.measurements.performance.ways.KINDS`.
    """

    tokens: int
    offspring: int
    sample: int
    rounds: int
    twice: bool
    evaluators: tuple[str, ...]


def speed(model: nn.Module, setup: Setup, plan: SpeedPlan) -> None:
    """Prints the table of all ways, and where the evaluators' time goes."""
    if not (setup.folder / "0.0.pt").exists():
        RoundedLevels(model).save(setup.folder)
    rng = np.random.default_rng(0)
    chosen = tuple(sorted(int(i) for i in rng.permutation(setup.candidates)[: plan.offspring]))
    slower = ("straightforward", "bare, batch 1", "bare, batch 4")
    seconds: dict[str, list[float]] = {}
    per_round = plan.tokens // plan.rounds
    errors: dict[str, list[float]] = {kind: [] for kind in plan.evaluators}
    shares, begin = [], time.perf_counter()
    with ExitStack() as stack:
        ways = {kind: stack.enter_context(Way(kind, setup)) for kind in (*slower, *plan.evaluators)}
        for number in range(plan.rounds):
            minibatch = Minibatch(number, per_round)
            sample = tuple(int(i) for i in rng.permutation(chosen)[: plan.sample])
            for side in (0, 1) if plan.twice else (0,):
                for kind in slower if side == 0 else slower[::-1]:
                    seconds.setdefault(kind, []).append(ways[kind].run(Job(sample, minibatch)))
                for kind in plan.evaluators if side == 0 else ():
                    before = ways[kind].report
                    seconds.setdefault(kind, []).append(ways[kind].run(Job(chosen, minibatch)))
                    shares.append((kind, _shares(before, ways[kind].report, ways[kind].elapsed)))
            expected = ways["straightforward"].losses
            for kind, found in errors.items():
                known = dict(zip(chosen, ways[kind].losses, strict=True))
                found += [abs(known[i] / loss - 1) for i, loss in zip(sample, expected, strict=True)]
        reports = {kind: ways[kind].report for kind in plan.evaluators}
    _print(model, setup, plan, seconds, time.perf_counter() - begin)
    for kind in plan.evaluators:
        print(f"{kind}: a loss differs from the straightforward one by at most {max(errors[kind]):.1e} of it")
        print(f"  {_mean([s for k, s in shares if k == kind])}")
        print(f"  {_settings(reports[kind])}")


def _print(
    model: nn.Module, setup: Setup, plan: SpeedPlan, seconds: Mapping[str, Sequence[float]], elapsed: float
) -> None:
    per_round, work = plan.tokens // plan.rounds, _work_of_a_token(model)
    print(
        f"\n{plan.offspring} of {setup.candidates} offspring of one parent, {plan.tokens} tokens each in {plan.rounds}"
        f" rounds, {setup.tokens.shape[1]} a sequence; the slower ways score {plan.sample} of them a round, drawn at"
        f" random; {elapsed:.0f} s in all"
    )
    names = "".join(f"{f'times {kind}':>28}" for kind in plan.evaluators)
    print(f"{'':22}{'tokens/s':>10}{'TFLOP/s':>9}{names}")
    for kind, values in seconds.items():
        ratios = "".join(f"{_ratio(values, seconds[own]):>28}" for own in plan.evaluators)
        rate = per_round / min(values)
        print(f"{kind:22}{rate:10.0f}{rate * work / 1e12:9.3f}{ratios}")
    print("from the fastest turn of each, the least disturbed one; in brackets from all turns. Seconds a candidate:")
    for kind, values in seconds.items():
        print(f"  {kind}: {' '.join(f'{value:.3f}' for value in values)}")


def _ratio(values: Sequence[float], own: Sequence[float]) -> str:
    return f"{min(values) / min(own):.2f} ({min(values) / max(own):.2f} to {max(values) / min(own):.2f})"


def _shares(before: Mapping[str, Any], after: Mapping[str, Any], elapsed: float) -> dict[str, float]:
    parts = {part: (after[part] - before[part]) / after["threads"] / elapsed for part in ("body", "head", "switching")}
    parts["everything else"] = 1 - sum(parts.values())
    run, shared = (after[part] - before[part] for part in ("blocks_run", "blocks_shared"))
    return {**parts, "block passes saved": shared / (run + shared)}


def _mean(rows: Sequence[Mapping[str, float]]) -> str:
    return ", ".join(f"{part} {statistics.mean(row[part] for row in rows):.2%}" for part in rows[0])


def _settings(report: Mapping[str, Any]) -> str:
    names = ("dtype", "threads", "batch_size", "chunk", "compiled", "non_finite", "out_of_memory")
    rows = ", ".join(f"{what} {rate:.0f} tokens/s" for what, rate in report["measured"])
    return ", ".join(f"{name} {report[name]}" for name in names) + (f"; {rows}" if rows else "")


def _work_of_a_token(model: nn.Module) -> float:
    """Floating-point operations of the matrix products of body and head for one token (attention scores left out)."""
    blocks = sum(p.numel() for block in decoder_blocks(model).values() for p in block.parameters() if p.dim() == 2)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return 2.0 * (blocks + int(head.weight.numel()))


def peak(device: str, dtype: torch.dtype, threads: int) -> float:
    """Operations a second of a large matrix product: what the tables' TFLOP/s are held against."""
    size = 8192 if device == "cuda" else 2048
    torch.set_num_threads(threads)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        product: Tensor = matrix @ matrix
        float(product[0, 0])
        best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best
