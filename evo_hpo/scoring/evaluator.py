"""Scores assignments of a language model: exact losses at the least cost."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.levels import Levels
from evo_hpo.models.dropping import check_droppable
from evo_hpo.models.gates import GatedModel, output_head
from evo_hpo.models.identity import digest, model_identity, tokens_identity
from evo_hpo.models.mixed import dtype_name
from evo_hpo.models.structure import is_matrix, outer_matrices
from evo_hpo.record.environment import cores
from evo_hpo.scoring.allocator import keep_freed_memory
from evo_hpo.scoring.arithmetic import InputTypes
from evo_hpo.scoring.batch_scoring import BatchScorer
from evo_hpo.scoring.compiling import Compiled, compile_parts
from evo_hpo.scoring.dense import DenseSide, PackedSide
from evo_hpo.scoring.divergence import FITNESS, Fitness
from evo_hpo.scoring.head import Chunk, OutputHead
from evo_hpo.scoring.kept_inputs import KeptPaths
from evo_hpo.scoring.pool import ReplicaPool, one_core
from evo_hpo.scoring.replica import Replica
from evo_hpo.scoring.rounds import Rounds, Sums, counted, groups_of, scored
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.scoring.score_cache import ScoreCache
from evo_hpo.scoring.shortage import until_it_fits
from evo_hpo.scoring.switching import WeightSwitch, blocks_of_units
from evo_hpo.scoring.tuning import Tuned, default_shape, measure_settings
from evo_hpo.search.problem import Minibatch, Reading, Score
from evo_hpo.space.compression_space import Assignment

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Evaluator:
    """Losses of assignments on minibatches of a calibration pool.

    A candidate's loss on a batch of sequences depends on nothing else: not on other candidates, threads, or what ran
    before. So the same assignment and minibatch give the same bits in any order, with one batch size, on one machine.

    Args:
        model: decoder-only Hugging Face model with the uncompressed weights; it is not changed.
        levels: weights of every unit's levels, in the dtype of the model's matrices and on its device.
        calibration_tokens: int64, sequences x length, without padding.
        fitness: "kl" (KL(dense || compressed), nats a token), "perplexity" (the loss is the mean cross-entropy in nats;
            its exponential is the perplexity) or "topk_kl" (KL over the dense model's top-k entries, the tail as one).
        batch_size: sequences in one forward pass; decides the last bits of a loss. Default: see
            :func:`evo_hpo.scoring.tuning.default_shape`.
        chunk: logits that exist at one time; default: see there.
        threads: replicas that work side by side, one core each; default: the cores available. On a GPU: 1.
        compile: torch.compile the decoder blocks and the steps on a chunk of logits, each kept where measured faster;
            eager, with one logged line, where that fails. Takes up to a minute, so it is for long searches.
        measure: choose batch_size, chunk and threads by a few forward passes where they are not given; the choice is
            kept in the cache file and used again, because it decides the last bits of a loss.
        dense_bits: of each number that is kept of the uncompressed model: 16 (hidden x 2 bytes a token in all), or 32,
            for levels so close to it that a loss of 0.01 nats must be right to five digits.
        top_k: entries of "topk_kl".
        state_bytes: memory a replica may spend on block inputs kept for candidates with a common prefix.
        reference_bytes: memory for block inputs of the best assignment on a minibatch that is used again.
        packed_bytes: memory for weights in the layout that a CPU multiplies fastest (MKL's of float32; oneDNN's of
            bfloat16, with ``compile`` only), each for the searched layers and the head; mostly shared between replicas.
            0: the same bits a few per cent slower.
        early_stopping: with ``keep``, stop candidates that are provably not among the best; exact.
        cache: SQLite file of paid losses; None: in memory.
        identity: of the model, where it is known; default: computed from all of its weights and its configuration.
        stream: the decoder blocks wait on the CPU, and each comes to the model's device for its turn.
        inputs: what the inputs of a candidate's matrices are rounded to; None: they are as they come.

    Raises:
        ModelError: a model that cannot be gated, or whose modules cannot be dropped as the levels want.
        StoreError: levels of another model.
        InvalidSettingError: a setting outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Levels,
        calibration_tokens: Tensor,
        *,
        fitness: Fitness = "kl",
        batch_size: int | None = None,
        chunk: Chunk | None = None,
        threads: int | None = None,
        compile: bool = False,
        measure: bool = False,
        dense_bits: int = 16,
        top_k: int = 128,
        state_bytes: int = 1 << 28,
        reference_bytes: int = 1 << 29,
        packed_bytes: int = 1 << 31,
        early_stopping: bool = True,
        cache: Path | None = None,
        identity: Mapping[str, str] | None = None,
        stream: bool = False,
        inputs: InputTypes | None = None,
    ) -> None:
        if fitness not in FITNESS:
            raise InvalidSettingError(f"fitness {fitness!r} must be one of: {', '.join(FITNESS)}")
        if calibration_tokens.dim() != 2 or min(calibration_tokens.shape) < 1 or calibration_tokens.shape[1] < 2:
            shape = tuple(calibration_tokens.shape)
            raise InvalidSettingError(f"calibration tokens have shape {shape}: give sequences x length, length >= 2")
        if dense_bits not in (16, 32):
            raise InvalidSettingError(f"dense_bits={dense_bits} must be 16 or 32")
        for name, value in (("batch_size", batch_size), ("threads", threads), ("top_k", top_k)):
            if value is not None and value < 1:
                raise InvalidSettingError(f"{name}={value} must be at least 1")
        self.device = next(model.parameters()).device
        self.stream = self.device if stream else None
        on_cpu = self.device.type == "cpu"
        self.keeps_memory = on_cpu and keep_freed_memory()
        self.model, self.levels, self.fitness, self.inputs = model, levels, fitness, inputs
        self.tokens = calibration_tokens.to(self.device, torch.int64)
        self.length = int(self.tokens.shape[1])
        self.counts = {"candidates": 0, "cached": 0, "stopped": 0, "non_finite": 0, "out_of_memory": 0, "tokens": 0}
        self.seconds = 0.0
        example, lock = self.tokens[:1, : min(self.length, 16)], threading.Lock()
        count = (threads or cores()) if on_cpu else 1
        matrices = cast(Tensor, output_head(model).weight).dtype
        packed = packed_bytes if on_cpu and not stream and (compile or matrices == torch.float32) else 0
        by_rule = default_shape(self.device, self.length, compile and matrices == torch.bfloat16)
        self.chunk = chunk or by_rule.chunk
        members = {name for unit in levels.units for name in unit.members}
        check_droppable(model, {n for n, m in model.named_modules() if n in members and not is_matrix(m)}, example)
        with one_core():
            self.pool = ReplicaPool([self._replica(model, example, lock, packed) for _ in range(count)], on_cpu)
        self.blocks = tuple(self.pool.replicas[0].gated.blocks)
        self._batches = BatchScorer(
            self.pool,
            self.tokens,
            fitness,
            blocks_of_units(levels.units, self.blocks, tuple(outer_matrices(model))),
            batch_size or by_rule.batch_size,
            dense_bits,
            top_k,
            state_bytes,
            Rounds(early_stopping),
            KeptPaths(reference_bytes),
            packed > 0,
        )
        self.identity = {
            **(identity or model_identity(model)),
            "store": levels.fingerprint,
            "calibration text": tokens_identity(self.tokens),
            "dtype": dtype_name(model),
            **({} if inputs is None else {"arithmetic": inputs.fingerprint}),
            **({"code": "compiled"} if compile and matrices != torch.float32 else {}),
        }
        self.cache = ScoreCache(cache, self.context())
        self.measured: Tuned | None = None
        if measure:
            self._measure(batch_size, chunk, threads)
        self._expect_batches()
        self.compiled = self._compile() if compile else Compiled()
        self._held_out: dict[str, list[DenseSide | PackedSide]] = {}

    def _replica(self, model: nn.Module, example: Tensor, lock: threading.Lock, packed: int) -> Replica:
        gated = GatedModel(model, example, self.stream)
        head = OutputHead(gated, example, packed)
        head.chunk = self.chunk
        switch = WeightSwitch(gated, self.levels, example, lock, packed, self.inputs)
        head.searched = any(getattr(m, "weight", None) is gated.head.weight for m in switch.modules.values())
        return Replica(gated, switch, head, self.fitness)

    def _expect_batches(self) -> None:
        for replica in self.pool.replicas:
            replica.batch = (self._batches.batch_size, self.length)

    def _measure(self, batch_size: int | None, chunk: Chunk | None, threads: int | None) -> None:
        kept = self.cache.settings()
        if "batch_size" not in kept:
            self.measured = found = measure_settings(self.pool, self.tokens)
            kept |= {"batch_size": found.batch_size, "threads": found.threads}
            kept |= {"chunk_tokens": found.chunk.tokens, "chunk_vocabulary": found.chunk.vocabulary}
            self.cache.keep_settings(kept)
        self._batches.batch_size = batch_size or kept["batch_size"]
        self.chunk = chunk or Chunk(kept["chunk_tokens"], kept["chunk_vocabulary"])
        self.pool.shrink(threads or kept["threads"])
        for replica in self.pool.replicas:
            replica.head.chunk = self.chunk

    def _compile(self) -> Compiled:
        kept = self.cache.settings()
        found = compile_parts(self.pool, self.levels, self.tokens[: self._batches.batch_size], kept)
        decided = {f"compiled_{part}": int(part in found.parts) for part in ("blocks", "chunk")}
        self.cache.keep_settings(decided | kept)
        return found

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
        groups = groups_of(sequences, self._batches.batch_size)
        found, todo, keep = self._batches.rounds.known_of(
            assignments, minibatch.seed, groups, keep, lambda a: self.cache.get(a, minibatch)
        )
        self.counts["cached"] += len(found)
        if todo:
            sums, read = self._with_less_memory(lambda: self._batches.evaluate(todo, sequences, keep))
            new = {a: s for a, s in zip(todo, sums, strict=True) if a not in found}
            for name, count in counted([*new.values()], read, self.length).items():
                self.counts[name] += count
            self.cache.put({a: s for a, s in new.items() if not np.isnan(s).any()}, minibatch)
            found.update(zip(todo, sums, strict=True))
        self.seconds += time.perf_counter() - start
        return [scored(found[tuple(map(int, a))], self.length) for a in assignments]

    def reading(self) -> Reading:
        """How minibatches are read: with :meth:`read`, all that another process needs to score like this one."""
        return Reading(len(self.tokens), self.length, self._batches.batch_size, self._batches.rounds.early_stopping)

    def read(self, assignments: Sequence[Assignment], groups: Sequence[Sequence[int]]) -> Sums:
        """Sums (nats) over the positions of sequences of the pool, assignments x sequences; nothing is remembered."""
        return self._with_less_memory(lambda: self._batches.read(assignments, groups))

    def prepare(self, sequences: int | None = None) -> None:
        """Makes what is kept of the uncompressed model now, not when needed: for the pool's first sequences, or all."""
        count = len(self.tokens) if sequences is None else sequences
        self._with_less_memory(lambda: self._batches.make_dense(range(count)))

    def _with_less_memory(self, work: Callable[[], T]) -> T:
        """Runs the work; each time memory runs out, halves the batch, and keeps fewer states when it is at 1."""

        def give_up() -> bool:
            self.counts["out_of_memory"] += 1
            if not self._batches.give_up():
                return False
            self._held_out.clear()  # it is there by batch
            self._expect_batches()
            _log.warning("out of memory: going on with %d sequences a batch", self._batches.batch_size)
            return True

        return until_it_fits(work, give_up, self.device)

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
        sums = self._with_less_memory(lambda: self._held_out_sums(assignment, ids)) / (ids.shape[1] - 1)
        loss, entropy = (float(x) for x in sums.mean(axis=1))
        return {
            "loss": loss,
            "cross_entropy": entropy,
            "perplexity": math.exp(entropy) if entropy < 700 else math.inf,
            "losses": sums[0].tolist(),
            "cross_entropies": sums[1].tolist(),
        }

    def _held_out_sums(self, assignment: Assignment | None, ids: Tensor) -> NDArray[np.float64]:
        """KL divergence and cross-entropy, summed over each sequence's positions, 2 x sequences."""
        rows = torch.split(ids, self._batches.batch_size)
        key = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()
        if key not in self._held_out:
            make = [lambda w, r=row: w.dense(r, self._batches.dense_bits, self._batches.top_k, "kl") for row in rows]
            self._held_out[key] = self.pool.map(make)
        sides = self._held_out[key]
        tasks = [lambda w, r=row, d=side: w.both(assignment, r, d) for row, side in zip(rows, sides, strict=True)]
        return torch.cat(self.pool.map(tasks), dim=1).cpu().numpy()

    # ------------------------------------------------------------------ identity and report

    def context(self) -> str:
        """Hash of everything a loss depends on besides assignment and minibatch."""
        settings = (self.fitness, self._batches.dense_bits, self._batches.top_k)
        return digest([*map(str, settings), *(f"{k}={v}" for k, v in sorted(self.identity.items()))])

    @property
    def dense(self) -> dict[int, DenseSide | PackedSide]:
        """What is kept of the uncompressed model, by sequence of the pool."""
        return self._batches.dense

    def close(self) -> None:
        """Ends the threads and closes the cache file."""
        self.pool.close()
        self.cache.close()

    def report(self) -> Mapping[str, Any]:
        """Settings in force, what was counted, and where the time of all replicas went (seconds)."""
        return {
            "device": str(self.device),
            "dtype": self.identity["dtype"],
            "threads": len(self.pool),
            "batch_size": self._batches.batch_size,
            "chunk": (self.chunk.tokens, self.chunk.vocabulary),
            "compiled": self.compiled.parts,
            "keeps_memory": self.keeps_memory,
            "measured": (() if self.measured is None else self.measured.rows) + self.compiled.rows,
            "dense_bytes": sum(d.bytes for d in self.dense.values()),
            "seconds": self.seconds,
            **vars(self.pool.timing()),
            **self.counts,
        }
