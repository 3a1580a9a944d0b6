"""Scores assignments of a language model: exact losses at the least cost."""

from __future__ import annotations

import hashlib
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evo_hpo.errors import InvalidSettingError
from evo_hpo.language_model.divergence import DenseSide, Fitness
from evo_hpo.language_model.gates import GatedModel
from evo_hpo.language_model.head import OutputHead
from evo_hpo.language_model.prefixes import signature
from evo_hpo.language_model.sampling import sequences_of
from evo_hpo.language_model.score_cache import ScoreCache
from evo_hpo.language_model.switching import LevelSwitch, WeightSource, blocks_of_units
from evo_hpo.language_model.worker import Timing, Worker
from evo_hpo.problem import Minibatch, Score
from evo_hpo.space import Assignment

__all__ = ["Evaluator"]

T = TypeVar("T")
Sums = NDArray[np.float64]


class Evaluator:
    """Losses of assignments on minibatches of a calibration pool.

    A candidate's loss on a sequence depends on nothing else: not on the other candidates, the threads, or what ran
    before. So the same assignment and minibatch give the same bits in any order, with one batch size, on one machine.

    Args:
        model: decoder-only Hugging Face model with the uncompressed weights; it is not changed.
        levels: weights of every unit's levels, in the model's dtype and on its device.
        calibration_tokens: int64, sequences x length, without padding.
        fitness: "kl" (KL(dense || compressed), nats a token), "perplexity" (the loss is the mean cross-entropy in nats;
            its exponential is the perplexity) or "topk_kl" (KL over the dense model's top-k entries, the tail as one).
        batch_size: sequences in one forward pass.
        threads: replicas that work side by side, one core each; default: the cores available. On a GPU: 1.
        dense_dtype: how the uncompressed model's vectors are kept: float32 (hidden x 4 bytes a token) or float16.
        top_k: entries of "topk_kl".
        state_bytes: memory a replica may spend on block inputs kept for candidates with a common prefix.
        early_stopping: with ``keep``, stop candidates that are provably not among the best; exact.
        cache: SQLite file of paid losses; None: in memory.

    Raises:
        ModelError: a model that cannot be gated. StoreError: levels of another model.
        InvalidSettingError: a setting outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: WeightSource,
        calibration_tokens: Tensor,
        *,
        fitness: Fitness = "kl",
        batch_size: int | None = None,
        threads: int | None = None,
        dense_dtype: torch.dtype = torch.float32,
        top_k: int = 128,
        state_bytes: int = 1 << 28,
        early_stopping: bool = True,
        cache: Path | None = None,
    ) -> None:
        if fitness not in ("kl", "perplexity", "topk_kl"):
            raise InvalidSettingError(f"fitness {fitness!r} must be one of: kl, perplexity, topk_kl")
        if calibration_tokens.dim() != 2 or min(calibration_tokens.shape) < 1 or calibration_tokens.shape[1] < 2:
            shape = tuple(calibration_tokens.shape)
            raise InvalidSettingError(f"calibration tokens have shape {shape}: give sequences x length, length >= 2")
        weight = next(model.parameters())
        self.device = weight.device
        self.levels, self.fitness = levels, fitness
        self.tokens = calibration_tokens.to(self.device, torch.int64)
        self.length = int(self.tokens.shape[1])
        self.dense_dtype, self.top_k = dense_dtype, top_k
        self.state_bytes, self.early_stopping = state_bytes, early_stopping
        self.batch_size = batch_size or 1
        self.threads = threads or (len(os.sched_getaffinity(0)) if self.device.type == "cpu" else 1)
        self.counts = {"candidates": 0, "cached": 0, "stopped": 0, "non_finite": 0, "out_of_memory": 0, "tokens": 0}
        self.seconds = 0.0
        example = self.tokens[:1, : min(self.length, 16)]
        lock = threading.Lock()
        self._workers = [self._worker(model, example, lock) for _ in range(self.threads)]
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        self.blocks = tuple(self._workers[0].gated.blocks)
        self._units_of_blocks = blocks_of_units(levels.units, self.blocks)
        self._dense: dict[int, DenseSide] = {}
        self._held_out: dict[str, list[DenseSide]] = {}
        self._model_hash = _model_hash(model)
        self.cache = ScoreCache(cache, self.context())

    def _worker(self, model: nn.Module, example: Tensor, lock: threading.Lock) -> Worker:
        gated = GatedModel(model, example)
        with torch.inference_mode():
            hidden, _ = gated.final_hidden(example)
        head = OutputHead(model, hidden, example, gated.head)
        return Worker(gated, LevelSwitch(gated, self.levels, example, lock), head, self.fitness)

    # ------------------------------------------------------------------ scoring

    def score(self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None) -> list[Score]:
        """Losses (nats a token, lower is better) of the assignments on one minibatch, in order.

        Args:
            minibatch: its sequences are the first of the pool's permutation by its seed.
            keep: only the best ``keep`` must be complete; others may come back as stopped, with a lower bound.

        Raises:
            InvalidSettingError: tokens not a whole number of sequences, or more than the pool.
        """
        start = time.perf_counter()
        sequences = sequences_of(minibatch, len(self.tokens), self.length)
        found: dict[Assignment, Sums] = {}
        for assignment in dict.fromkeys(map(tuple, assignments)):
            known = self.cache.get(assignment, minibatch)
            if known is not None:
                found[assignment] = known
                self.counts["cached"] += 1
        todo = [a for a in dict.fromkeys(map(tuple, assignments)) if a not in found]
        if todo:
            new = self._with_less_memory(lambda: self._evaluate(todo, sequences, keep, list(found.values())))
            self.cache.put({a: s for a, s in new.items() if not np.isnan(s).any()}, minibatch)
            found.update(new)
        self.seconds += time.perf_counter() - start
        return [self._score(found[tuple(a)]) for a in assignments]

    def per_sequence(self, assignment: Assignment, minibatch: Minibatch) -> Sums:
        """Mean loss of each sequence of a minibatch (nats a token), for intervals and paired comparisons."""
        self.score([assignment], minibatch)
        sums = self.cache.get(assignment, minibatch)
        assert sums is not None
        return sums / (self.length - 1)

    def _score(self, sums: Sums) -> Score:
        read = int((~np.isnan(sums)).sum())
        loss = float(np.nansum(sums)) / (len(sums) * (self.length - 1))
        if not math.isfinite(loss):
            return Score(math.inf, read * self.length, reason="the loss is not finite")
        return Score(loss, read * self.length, stopped=read < len(sums))

    def _evaluate(
        self, todo: list[Assignment], sequences: tuple[int, ...], keep: int | None, known: list[Sums]
    ) -> dict[Assignment, Sums]:
        """Sums of each sequence for each candidate; NaN where a candidate was stopped before that sequence."""
        batches = [sequences[i : i + self.batch_size] for i in range(0, len(sequences), self.batch_size)]
        self._make_dense(sequences)
        sums = np.full((len(todo), len(sequences)), np.nan)
        everyone = list(range(len(todo)))
        if keep is None or not self.early_stopping or keep >= len(todo) + len(known) or len(batches) < 2:
            self._run(todo, everyone, batches, 0, sums)
        else:
            self._race(todo, batches, sums, keep, known)
        self.counts["candidates"] += len(todo)
        self.counts["tokens"] += int((~np.isnan(sums)).sum()) * self.length
        self.counts["stopped"] += int(np.isnan(sums).any(axis=1).sum())
        self.counts["non_finite"] += int(np.isinf(sums).any(axis=1).sum())
        return dict(zip(todo, sums, strict=True))

    def _race(
        self, todo: list[Assignment], batches: list[tuple[int, ...]], sums: Sums, keep: int, known: list[Sums]
    ) -> None:
        """Completes the best ``keep``; drops every other as soon as its partial sum exceeds the worst of those.

        A sequence's sum is never negative, so a partial sum is a lower bound. The candidates that look best after the
        first batch are completed first, which gives the bound; the others follow batch by batch.
        """
        self._run(todo, list(range(len(todo))), batches[:1], 0, sums)
        done = len(batches[0])
        order = sorted(range(len(todo)), key=lambda i: (float(np.nansum(sums[i])), i))
        totals = sorted(float(s.sum()) for s in known)
        first, rest = order[:keep], order[keep:]
        self._run(todo, first, batches[1:], done, sums)
        totals = sorted([*totals, *(float(sums[i].sum()) for i in first)])
        for batch in batches[1:]:
            bound = totals[keep - 1] * (1 + 1e-6) + 1e-9
            rest = [i for i in rest if float(np.nansum(sums[i])) <= bound]
            if not rest:
                return
            self._run(todo, rest, [batch], done, sums)
            done += len(batch)

    def _run(
        self, todo: list[Assignment], chosen: list[int], batches: list[tuple[int, ...]], column: int, sums: Sums
    ) -> None:
        """Runs the chosen candidates on the batches and fills their columns of ``sums`` from ``column`` on."""
        signatures = {i: signature(todo[i], self._units_of_blocks) for i in chosen}
        chosen = sorted(chosen, key=signatures.__getitem__)
        whole = len(batches) // self.threads * self.threads
        tasks: list[Callable[[Worker], tuple[list[int], int, Tensor]]] = []
        for position, batch in enumerate(batches):
            parts = 1 if position < whole else min(self.threads, len(chosen))
            for part in range(parts):
                members = chosen[part * len(chosen) // parts : (part + 1) * len(chosen) // parts]
                first = column + sum(map(len, batches[:position]))
                tasks.append(self._task(todo, members, [signatures[i] for i in members], batch, first))
        for members, first, result in self._map(tasks):
            values = result.cpu().numpy()
            values[np.isnan(values)] = np.inf
            sums[members, first : first + values.shape[1]] = values

    def _task(
        self, todo: list[Assignment], members: list[int], signatures: list[Any], batch: tuple[int, ...], first: int
    ) -> Callable[[Worker], tuple[list[int], int, Tensor]]:
        def task(worker: Worker) -> tuple[list[int], int, Tensor]:
            ids = self.tokens[list(batch)]
            dense = None if self.fitness == "perplexity" else _stack([self._dense[s] for s in batch])
            chosen = [todo[i] for i in members]
            return members, first, worker.run(chosen, signatures, ids, dense, self.state_bytes)

        return task

    def _make_dense(self, sequences: Sequence[int]) -> None:
        """Adds what is missing of the uncompressed model; one sequence at a time, so that no batch changes its bits."""
        if self.fitness == "perplexity":
            return
        missing = [s for s in sequences if s not in self._dense]

        def task(sequence: int) -> Callable[[Worker], tuple[int, DenseSide]]:
            return lambda worker: (sequence, worker.dense(self.tokens[[sequence]], self.dense_dtype, self.top_k))

        self._dense.update(self._map([task(s) for s in missing]))

    def _map(self, tasks: Sequence[Callable[[Worker], T]]) -> list[T]:
        def call(task: Callable[[Worker], T]) -> T:
            worker = self._free.get()
            try:
                return task(worker)
            finally:
                self._free.put(worker)

        before = torch.get_num_threads()
        torch.set_num_threads(1 if self.device.type == "cpu" else before)
        try:
            if self.threads == 1 or len(tasks) == 1:
                return [call(task) for task in tasks]
            return list(self._pool.map(call, tasks))
        finally:
            torch.set_num_threads(before)

    def _with_less_memory(self, work: Callable[[], T]) -> T:
        """Runs the work; each time memory runs out, halves the batch, and keeps fewer states when it is at 1."""
        while True:
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                self.counts["out_of_memory"] += 1
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                if self.batch_size > 1:
                    self.batch_size //= 2
                elif self.state_bytes:
                    self.state_bytes = 0
                else:
                    raise MemoryError(str(error)) from error

    # ------------------------------------------------------------------ held-out data

    def evaluate_held_out(self, assignment: Assignment | None, tokens: Tensor) -> dict[str, Any]:
        """Figures on other data; None: the uncompressed model.

        Args:
            tokens: int64, sequences x length.

        Returns:
            loss (KL from the uncompressed model, nats a token), cross_entropy (nats a token), perplexity, and the
            means of each sequence: losses, cross_entropies (lists).
        """
        ids = tokens.to(self.device, torch.int64)
        key = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()
        rows = [ids[i : i + 1] for i in range(len(ids))]
        if key not in self._held_out:
            make = [lambda w, r=row: w.dense(r, self.dense_dtype, self.top_k, "kl") for row in rows]
            self._held_out[key] = self._map(make)
        sides = self._held_out[key]
        tasks = [lambda w, r=row, d=side: w.both(assignment, r, d) for row, side in zip(rows, sides, strict=True)]
        sums = torch.cat(self._map(tasks), dim=1).cpu().numpy() / (ids.shape[1] - 1)
        loss, entropy = (float(x) for x in sums.mean(axis=1))
        return {
            "loss": loss,
            "cross_entropy": entropy,
            "perplexity": math.exp(entropy) if entropy < 700 else math.inf,
            "losses": sums[0].tolist(),
            "cross_entropies": sums[1].tolist(),
        }

    # ------------------------------------------------------------------ identity and report

    def context(self) -> str:
        """Hash of everything a loss depends on besides assignment and minibatch."""
        parts = [self._model_hash, self.levels.fingerprint, self.fitness, str(self.dense_dtype), str(self.top_k)]
        digest = hashlib.sha256("|".join(parts).encode())
        digest.update(self.tokens.cpu().numpy().tobytes())
        return digest.hexdigest()[:32]

    def report(self) -> Mapping[str, Any]:
        """Settings in force, what was counted, and where the time of all replicas went (seconds)."""
        timing = Timing()
        for worker in self._workers:
            timing.add(worker.timing)
        return {
            "device": str(self.device),
            "dtype": str(self._workers[0].head.weight.dtype),
            "threads": self.threads,
            "batch_size": self.batch_size,
            "chunk": self._workers[0].head.chunk,
            "dense_bytes": sum(d.bytes for d in self._dense.values()),
            "seconds": self.seconds,
            **vars(timing),
            **self.counts,
        }


def _stack(sides: Sequence[DenseSide]) -> DenseSide:
    if len(sides) == 1:
        return sides[0]
    entries = [s.entries for s in sides if s.entries is not None]
    return DenseSide(
        torch.cat([s.vectors for s in sides]),
        torch.cat([s.constants for s in sides]),
        torch.cat(entries) if entries else None,
    )


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in text or "allocate memory" in text
    )


def _model_hash(model: nn.Module) -> str:
    """Names, shapes, and up to 64 values of each weight."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
