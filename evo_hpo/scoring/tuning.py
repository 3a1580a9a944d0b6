"""What suits a machine: its dtype, by what it is; other settings by short measurements, which are opt-in.

Settings decide the last bits of a loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from evo_hpo.scoring.head import Chunk
from evo_hpo.scoring.pool import ReplicaPool
from evo_hpo.scoring.replica import Replica

GAIN = 1.05
"""A larger setting must be this much faster than the smaller one."""

NATIVE = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Instructions that multiply bfloat16 on a CPU (x86, ARM), by their names in torch."""

GPU_TOKENS, COMPILED_TOKENS = 8192, 1024
"""In one pass: on a GPU; and on a CPU with compiled blocks in bfloat16."""

CHUNKS = (Chunk(512, 1024), Chunk(256, 2048), Chunk(512, 4096), Chunk(2048, 16384))


@dataclass(frozen=True)
class PassShape:
    """Sequences in a forward pass, and logits that exist at one time (tokens x vocabulary entries)."""

    batch_size: int
    chunk: Chunk


def default_shape(device: torch.device, length: int, compiled: bool) -> PassShape:
    """What runs fast on most machines, but a fixed rule: it decides the last bits of a loss.

    Args:
        length: of a sequence, in tokens.
        compiled: matrices are bfloat16 and code is compiled, which on a CPU gains by up to 1024 tokens in a pass; else
            there one sequence is as fast as several.
    """
    if device.type != "cpu":
        return PassShape(max(1, GPU_TOKENS // length), Chunk(tokens=2048, vocabulary=16384))
    if compiled:
        return PassShape(max(1, COMPILED_TOKENS // length), Chunk(tokens=COMPILED_TOKENS))
    return PassShape(1, Chunk())


@dataclass(frozen=True)
class Tuned:
    """Settings and what was seen.

    Attributes:
        rows: (what was tried, tokens a second), for the report.
    """

    batch_size: int
    chunk: Chunk
    threads: int
    rows: tuple[tuple[str, float], ...]


def measure_settings(pool: ReplicaPool, tokens: Tensor) -> Tuned:
    """Tries batch sizes, chunks and numbers of threads on a few forward passes of the uncompressed model.

    Args:
        pool: replicas, one for each thread that may be used.
        tokens: calibration pool, sequences x length.
    """
    rows: list[tuple[str, float]] = []

    def best(what: str, options: Iterable[int], speed: Callable[[int], float]) -> int:
        """The first option that no later one beats by :data:`GAIN`; stops at the first that does not."""
        chosen, fastest = 0, 0.0
        for option in options:
            rate = speed(option)
            rows.append((f"{what} {option}", rate))
            if rate < GAIN * fastest:
                break
            chosen, fastest = option, rate
        return chosen

    length = int(tokens.shape[1])

    def batch_rate(size: int) -> float:
        return size * length / _seconds(lambda: pool.map([_pass(tokens[:size])]), tokens)

    def thread_rate(count: int) -> float:
        passes = [_pass(tokens[:size])] * count
        return count * size * length / _seconds(lambda: pool.map(passes), tokens)

    sizes = [s for s in (1, 2, 4, 8, 16, 32) if s <= len(tokens)]
    size = best("sequences a batch", sizes, batch_rate)
    threads = best("threads", range(1, len(pool) + 1), thread_rate)
    chunk = _best_chunk(pool.replicas[0], tokens[:size], rows)
    return Tuned(size, chunk, threads, tuple(rows))


def _pass(ids: Tensor) -> Callable[[Replica], Tensor]:
    def run(replica: Replica) -> Tensor:
        with torch.inference_mode():
            replica.switch.set(None)
            return replica.gated.final_hidden(ids)[0]

    return run


def _best_chunk(replica: Replica, ids: Tensor, rows: list[tuple[str, float]]) -> Chunk:
    before, rates = replica.head.chunk, {}
    with torch.inference_mode():
        hidden = _pass(ids)(replica).flatten(0, 1)
        for chunk in CHUNKS:
            replica.head.chunk = chunk
            rates[chunk] = len(hidden) / _seconds(lambda: replica.head.log_normaliser(hidden), ids)
            rows.append((f"chunk {chunk.tokens} x {chunk.vocabulary}", rates[chunk]))
    replica.head.chunk = before
    return max(rates, key=rates.__getitem__)


def own_seconds(work: Callable[[], object], like: Tensor, repeats: int = 3) -> float:
    """The least of a few runs, after one that is not counted; on a CPU of processor time: nobody else may decide."""
    return _seconds(work, like, repeats, time.perf_counter if like.is_cuda else time.thread_time)


def _seconds(
    work: Callable[[], object], like: Tensor, repeats: int = 2, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The least of a few timings, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        _wait(like)
        start = clock()
        work()
        _wait(like)
        times.append(clock() - start)
    return min(times)


def _wait(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)


def fastest_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32.

    The device is asked, not measured: beside other programs a measurement comes out otherwise, and all losses with it.
    A CPU without such instructions emulates bfloat16, several times slower.
    """
    kind, native = torch.device(device).type, False
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        native = any(torch.cpu.get_capabilities().get(name) for name in NATIVE)
    return torch.bfloat16 if native else torch.float32
