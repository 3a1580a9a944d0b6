"""One backward pass that asks for every level of every unit at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.levels.levels import Levels
from evo_hpo.models.experts import LinearExperts
from evo_hpo.models.structure import outer_matrices, weight_users
from evo_hpo.models.text import sample_from_model
from evo_hpo.scoring.allocator import give_back_freed_memory
from evo_hpo.scoring.arithmetic import InputTypes
from evo_hpo.scoring.backward import Asked, BackwardReplica
from evo_hpo.scoring.decoded import Decoded
from evo_hpo.scoring.head import Chunk
from evo_hpo.scoring.pool import ReplicaPool
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.scoring.shortage import until_it_fits
from evo_hpo.scoring.tuning import default_shape
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.sensitivities import READS, Form, Kind, Sensitivities, check_kind
from evo_hpo.space.compression_space import Assignment

T = TypeVar("T")

_log = logging.getLogger(__name__)

WRITTEN_TOGETHER = 16384
"""Tokens of the sequences that the model writes at a time (an 8B model's keys and values take 2 GB then): on a GPU the
next token of all of them takes little longer than that of one."""


class SensitivityPass:
    """Measures :class:`Sensitivities` of a language model; shares the memory of the model's weights.

    On a CPU, where nothing is streamed, each thread of the pool takes some of the sequences with a replica of its own,
    one core each, so that no number depends on how many there are. All go through a block before any goes on: levels
    are decoded once.

    Args:
        model: decoder-only Hugging Face model with the uncompressed weights; it is not changed.
        levels: weights of every unit's levels, in the dtype of the model's matrices and on its device.
        tokens: the calibration pool, int64, sequences x length, on the model's device.
        chunk: logits that exist at one time; None: as many as the evaluator takes on this device unless told otherwise.
        graph_bytes: memory for the graphs of blocks; blocks beyond it run a second time.
        group: most sequences in one pass; levels are decoded once for each, and the inputs and output gradients of one
            block's layers are kept for all of it. Where blocks are streamed it is as many as ``batch``.
        batch: sequences that run together; None: one on a CPU, whose caches hold little more, else (and where blocks
            are streamed) the group. A mixture of experts takes one: its experts see tokens, not sequences.
        stream: device that each block comes to for its turn; no graph outlives a turn. None: blocks are where they run.
        inputs: as of the evaluator; a gradient passes a rounding as if it were not there.
        pool: of the evaluator, whose threads run it, each on one core; None: the calling thread does.

    Raises:
        ModelError: several layers share the weight of a unit.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Levels,
        tokens: Tensor,
        *,
        chunk: Chunk | None = None,
        graph_bytes: int = 1 << 32,
        group: int = 16,
        batch: int | None = None,
        stream: torch.device | None = None,
        inputs: InputTypes | None = None,
        pool: ReplicaPool | None = None,
    ) -> None:
        _refuse_shared(model, levels)
        on_cpu = tokens.device.type == "cpu" and not stream
        if any(isinstance(m, LinearExperts) for m in model.modules()):
            batch = 1
        elif batch is None:
            batch = 1 if on_cpu else group
        batch = min(batch, group)
        self._model, self._tokens, self._stream = model, tokens, stream
        self._graph_bytes = 0 if stream else graph_bytes
        self._group = batch if stream else group  # a block comes to the device once for all that run
        self._pool, self._splits = pool, on_cpu
        self._decoded, self._batch = Decoded(levels), batch
        chunk = chunk or default_shape(tokens.device, tokens.shape[1], compiled=False).chunk
        example = tokens[:1, : min(tokens.shape[1], 16)]

        self._new_replica = partial(BackwardReplica, model, levels, self._decoded, example, chunk, stream, inputs)
        self._replicas = self._side_by_side([self._new_replica])

    def measure(
        self, assignment: Assignment | None, minibatch: Minibatch, kind: Kind = "sampled", form: Form = "inner"
    ) -> Sensitivities:
        """Sensitivities at an assignment (None: the uncompressed model) on a minibatch of the pool.

        Labels are drawn by a generator of the minibatch's seed and the sequence's number, so that a larger minibatch
        of the same seed begins with the same projections; one of text that the model writes need not. Each time that
        memory runs out, the pass begins anew, at first without graphs that are kept, then with half as many sequences.

        Raises:
            InvalidSettingError: tokens not a whole number of sequences, or more than the pool; an unknown kind.
            MemoryError: there is too little for a single sequence.
        """
        check_kind(kind, assignment, form)
        length = self._tokens.shape[1]
        sequences = sequences_of(minibatch, len(self._tokens), length)
        text = self._written(minibatch) if minibatch.generated else self._tokens[list(sequences)]
        parted = self._parted(kind, form)
        asked = Asked(assignment, kind, form, minibatch.seed, parted)

        def groups_measured() -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
            parts = (slice(i, i + self._group) for i in range(0, len(sequences), self._group))
            return [self._measure(asked, text[part], sequences[part]) for part in parts]

        try:
            groups = until_it_fits(groups_measured, self._give_up, self._tokens.device)
        finally:
            if self._tokens.device.type == "cpu":
                give_back_freed_memory()  # graphs of every size leave the heap in pieces
        projections, squares = (np.concatenate(found).astype(np.float32) for found in zip(*groups, strict=True))
        charged = (READS + minibatch.generated) * minibatch.tokens
        return Sensitivities(kind, assignment, projections, length - 1, charged, form, squares if parted else None)

    def _give_up(self) -> bool:
        """Makes the pass need less memory; False: it is as small as it can be."""
        if self._graph_bytes:
            self._graph_bytes = 0
        elif self._group > 1:
            self._group //= 2
            self._batch = min(self._batch, self._group)
        else:
            return False
        _log.warning("out of memory in a backward pass: going on with %d sequences, and no graphs kept", self._group)
        return True

    @staticmethod
    def _parted(kind: Kind, form: Form) -> bool:
        """Whether there is a curvature that parts of a sequence tell better than the sequence."""
        return kind != "kl" and form == "inner"

    def _written(self, minibatch: Minibatch) -> Tensor:
        """Text that the uncompressed model writes by the minibatch's seed, sequences x length."""
        if self._stream and self._tokens.device.type != "cpu":
            raise InvalidSettingError("a model whose blocks are brought to the device writes no text: use the pool's")
        length = self._tokens.shape[1]
        together = max(1, WRITTEN_TOGETHER // length)
        count = minibatch.tokens // length
        (text,) = self._side_by_side([lambda: sample_from_model(self._model, count, length, minibatch.seed, together)])
        return text.to(self._tokens.device)

    def _measure(
        self, asked: Asked, ids: Tensor, sequences: tuple[int, ...]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        count = len(self._pool) if self._pool is not None and self._splits else 1
        size = -(-len(ids) // (self._batch * count)) * self._batch  # of whole batches, in which bits may depend on all
        parts = [slice(i, i + size) for i in range(0, len(ids), size)]
        self._replicas += self._side_by_side([self._new_replica] * (len(parts) - len(self._replicas)))
        replicas = self._replicas[: len(parts)]
        try:
            share = self._graph_bytes // len(parts)
            self._side_by_side(
                [
                    partial(replica.begin, asked, ids[part], sequences[part], self._batch, share)
                    for replica, part in zip(replicas, parts, strict=True)
                ]
            )
            self._decoded.forget()
            for number in reversed(range(replicas[0].blocks)):
                self._side_by_side([partial(replica.through, number) for replica in replicas])
                self._decoded.forget()
            projections, squares = zip(*self._side_by_side([replica.end for replica in replicas]), strict=True)
            return np.concatenate(projections), np.concatenate(squares)
        finally:
            for replica in replicas:
                replica.forget()
            self._decoded.forget()

    def _side_by_side(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        return [task() for task in tasks] if self._pool is None else self._pool.run(tasks)


def _refuse_shared(model: nn.Module, levels: Levels) -> None:
    """Each layer would tell the gradient of its own use of the weight; embedding and head are told together."""
    modules = dict(model.named_modules())
    inside = modules.keys() - outer_matrices(model).keys()
    members = {name: modules[name] for unit in levels.units for name in unit.members if name in inside}
    for name, users in weight_users(model, members).items():
        if len(users) > 1:
            raise ModelError(
                f"sensitivities of {type(model).__name__} cannot be measured: {len(users)} layers share the weight of"
                f" {name!r}; take a searcher that asks for none"
            )
