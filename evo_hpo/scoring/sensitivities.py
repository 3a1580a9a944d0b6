"""One backward pass that asks for every level of every unit at once.

The model runs block by block, each block's graph by itself, so that graphs can be freed, or not be kept at all and be
made again when their turn comes. No parameter requires a gradient: :class:`~evo_hpo.scoring.projections.Projector`
takes what is asked from the gradients of the layers' outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.levels import Levels
from evo_hpo.models.experts import LinearExperts
from evo_hpo.models.gates import GatedModel
from evo_hpo.models.text import sample_from_model
from evo_hpo.scoring.allocator import give_back_freed_memory
from evo_hpo.scoring.arithmetic import InputTypes
from evo_hpo.scoring.head import Chunk, OutputHead
from evo_hpo.scoring.output_gradient import (
    Reference,
    divergence_gradient,
    likelihood_gradient,
    logit_gradients,
    sampled_labels,
)
from evo_hpo.scoring.projections import Projector
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.scoring.switching import WeightSwitch
from evo_hpo.scoring.tuning import default_shape
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.sensitivities import READS, Form, Kind, Sensitivities, check_kind
from evo_hpo.space.compression_space import Assignment

WRITTEN_TOGETHER = 16384
"""Tokens of the sequences that the model writes at a time (an 8B model's keys and values take 2 GB then): on a GPU the
next token of all of them takes little longer than that of one."""


@dataclass
class _Segment:
    """A block's part of the graph.

    Attributes:
        leaf: its input, cut off from the block before.
        tail: its output as the next block sees it.
        output: its output with the graph; None: not kept.
        again: runs the block on ``leaf``.
        real: runs its own code on ``leaf``, also where it is dropped.
    """

    name: str
    leaf: Tensor
    tail: Tensor
    output: Tensor | None
    again: Callable[[], Any]
    real: Callable[[], Any]


@dataclass
class _Run:
    """Some of a group's sequences, on their way through the model and back.

    Attributes:
        rows: their places in the group.
        segments: of the blocks, in order; taken off the end on the way back.
        front: input of the first block, with the graph from the embedding on.
        gradient: of the output of the last segment that is left.
    """

    rows: slice
    segments: list[_Segment] = field(default_factory=list)
    front: Tensor | None = None
    gradient: Tensor | None = None


class SensitivityPass:
    """Measures :class:`Sensitivities` of a language model; shares the memory of the model's weights.

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
    ) -> None:
        example = tokens[:1, : min(tokens.shape[1], 16)]
        self._model, self._gated = model, GatedModel(model, example, stream)
        self._head = OutputHead(self._gated, example)
        self._head.chunk = chunk or default_shape(tokens.device, tokens.shape[1], compiled=False).chunk
        self._switch = WeightSwitch(self._gated, levels, example, threading.Lock(), inputs=inputs)
        self._tokens, self._graph_bytes = tokens, 0 if stream else graph_bytes
        self._numbers = {name: number for number, name in enumerate(self._gated.blocks)}
        modules = dict(self._gated.model.named_modules())
        members = {name: modules[name] for unit in levels.units for name in unit.members}
        self._projector = Projector(levels, members, self._numbers, self._is_dropped, self._gated.head)
        shared = self._gated.head.weight
        self._searched_head = next((n for n, m in members.items() if getattr(m, "weight", None) is shared), "")
        self._wholes = [name for name in members if name in self._numbers]
        if any(isinstance(m, LinearExperts) for m in modules.values()):
            batch = 1
        elif batch is None:
            batch = 1 if tokens.device.type == "cpu" and not stream else group
        self._batch = min(batch, group)
        self._group = self._batch if stream else group  # a block comes to the device once for all that run
        self._run: _Run | None = None  # whose blocks' graphs are being made
        self._runs = 1  # of a group
        self._kept_from = len(self._numbers)
        for name, block in self._gated.blocks.items():
            block.forward = self._segmented(name, block, block.forward)

    def measure(
        self, assignment: Assignment | None, minibatch: Minibatch, kind: Kind = "sampled", form: Form = "inner"
    ) -> Sensitivities:
        """Sensitivities at an assignment (None: the uncompressed model) on a minibatch of the pool.

        Labels are drawn by a generator of the minibatch's seed and the sequence's number, so that a larger minibatch
        of the same seed begins with the same projections.

        Raises:
            InvalidSettingError: tokens not a whole number of sequences, or more than the pool; an unknown kind.
        """
        check_kind(kind, assignment, form)
        length = self._tokens.shape[1]
        sequences = sequences_of(minibatch, len(self._tokens), length)
        text = self._written(minibatch) if minibatch.generated else self._tokens[list(sequences)]
        groups = [
            self._measure(assignment, text[part], sequences[part], kind, form, minibatch.seed)
            for part in (slice(i, i + self._group) for i in range(0, len(sequences), self._group))
        ]
        projections, squares = (np.concatenate(found).astype(np.float32) for found in zip(*groups, strict=True))
        charged = (READS + minibatch.generated) * minibatch.tokens
        parts = squares if self._parted(kind, form) else None
        return Sensitivities(kind, assignment, projections, length - 1, charged, form, parts)

    @staticmethod
    def _parted(kind: Kind, form: Form) -> bool:
        """Whether there is a curvature that parts of a sequence tell better than the sequence."""
        return kind != "kl" and form == "inner"

    def _written(self, minibatch: Minibatch) -> Tensor:
        """Text that the uncompressed model writes by the minibatch's seed, sequences x length."""
        if self._gated.stream and self._tokens.device.type != "cpu":
            raise InvalidSettingError("a model whose blocks are brought to the device writes no text: use the pool's")
        length = self._tokens.shape[1]
        together = max(1, WRITTEN_TOGETHER // length)
        text = sample_from_model(self._model, minibatch.tokens // length, length, minibatch.seed, together)
        return text.to(self._tokens.device)

    def _measure(
        self,
        assignment: Assignment | None,
        ids: Tensor,
        sequences: tuple[int, ...],
        kind: Kind,
        form: Form,
        seed: int,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        runs = [_Run(slice(i, min(i + self._batch, len(ids)))) for i in range(0, len(ids), self._batch)]
        dense: Tensor | None = None
        if kind == "kl":
            self._switch.set(None)
            with torch.no_grad():
                dense = torch.cat([self._gated.final_hidden(ids[run.rows])[0] for run in runs])
        self._switch.set(assignment)
        head = self._head.of(self._gated.head.weight.data)  # type: ignore[arg-type]
        self._projector.begin(len(ids), ids.shape[1], form, self._parted(kind, form))
        self._runs, self._kept_from = len(runs), 0 if self._graph_bytes else len(self._numbers)
        try:
            finals = [self._forward(run, ids[run.rows]) for run in runs]
            uniforms = [np.random.default_rng([seed, 0x666973, s]).random(ids.shape[1] - 1) for s in sequences]
            with torch.no_grad():
                outputs = torch.cat([each.detach() for each in finals])
                gradient = self._at_output(head, ids, outputs, dense, kind, np.concatenate(uniforms))
            self._projector.finish()
            for run, final in zip(runs, finals, strict=True):
                (run.gradient,) = torch.autograd.grad(final, run.segments[-1].tail, gradient[run.rows])
            self._backward(runs)
            return self._projector.end()
        finally:
            runs.clear()
            self._projector.forget()
            if self._tokens.device.type == "cpu":
                give_back_freed_memory()  # graphs of every size leave the heap in pieces

    def _forward(self, run: _Run, ids: Tensor) -> Tensor:
        """The input of the output head, with the graph from the last block on; the blocks' graphs are the run's."""
        self._run = run
        try:
            with torch.enable_grad():
                return self._gated.final_hidden(ids)[0]
        finally:
            self._run = None  # a block that runs again makes no new segment

    def _at_output(
        self,
        head: OutputHead,
        ids: Tensor,
        final: Tensor,
        dense: Tensor | None,
        kind: Kind,
        uniforms: NDArray[np.float64],
    ) -> Tensor:
        """Gradient with respect to the final hidden states; the last position predicts nothing."""
        hidden = final[:, :-1].reshape(-1, final.shape[-1])
        labels: Tensor | None = None
        reference: Reference | None = None
        if dense is not None:
            reference = self._head, dense[:, :-1].reshape(hidden.shape)
            found = divergence_gradient(head, hidden, reference)
        elif kind == "sampled":
            labels, found = sampled_labels(head, hidden, torch.from_numpy(uniforms).to(ids.device))
        else:
            labels = ids[:, 1:].reshape(-1)
            found = likelihood_gradient(head, hidden, labels)
        if self._searched_head:
            self._projector.head(self._searched_head, hidden, logit_gradients(head, hidden, labels, reference))
        gradient = torch.zeros_like(final)
        gradient[:, :-1] = found.view(len(ids), -1, final.shape[-1])
        return gradient

    def _backward(self, runs: list[_Run]) -> None:
        for number in reversed(range(len(self._numbers))):
            with self._gated.stream.turn(number) if self._gated.stream else nullcontext():
                for run in runs:
                    self._projector.running(run.rows)
                    assert run.gradient is not None
                    run.gradient = self._through(run.segments.pop(), run.gradient)
                self._projector.finish()
        for run in runs:
            if run.front is not None and run.front.requires_grad:
                assert run.gradient is not None
                self._projector.running(run.rows)
                torch.autograd.backward(run.front, run.gradient.to(run.front.device))
        self._projector.finish()

    def _through(self, segment: _Segment, gradient: Tensor) -> Tensor:
        """The gradient of a block's input, from that of its output."""
        output, gradient = segment.output, gradient.to(segment.leaf.device)
        if output is None:
            with torch.enable_grad():
                output = _first(segment.again())
        if segment.name in self._wholes:
            with torch.no_grad():
                kept = _first(segment.real()) if self._is_dropped(segment.name) else output.detach()
                self._projector.whole(segment.name, kept - segment.leaf, gradient)
        torch.autograd.backward(output, gradient)
        assert segment.leaf.grad is not None
        return segment.leaf.grad

    def _segmented(self, name: str, block: nn.Module, gate: Callable[..., Any]) -> Callable[..., Any]:
        """The block's forward, cut off from the one before; ``gate`` passes its input through where it is dropped."""
        number = self._numbers[name]

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._run is None:
                return gate(*args, **kwargs)
            given = args[0] if args else kwargs["hidden_states"]
            if number == 0:
                self._run.front = given
            leaf = given.detach().requires_grad_()
            if args:
                args = (leaf, *args[1:])
            else:
                kwargs["hidden_states"] = leaf
            tells = number == 0 and self._kept_from == 0  # how many graphs fit; the last blocks' stay
            saved = _Saved(block) if tells else None
            if number >= self._kept_from:
                with torch.enable_grad(), saved or nullcontext():
                    output = gate(*args, **kwargs)
            else:
                with torch.no_grad():
                    output = gate(*args, **kwargs)
            if saved:
                fitting = self._graph_bytes // max(saved.bytes * self._runs, 1)
                self._kept_from = max(0, len(self._numbers) - fitting)
            first = _first(output)
            tail = first.detach().requires_grad_()
            real = partial(type(block).forward, block, *args, **kwargs)
            kept = first if number >= self._kept_from else None
            self._run.segments.append(_Segment(name, leaf, tail, kept, partial(gate, *args, **kwargs), real))
            return (tail, *output[1:]) if isinstance(output, tuple) else tail

        return run

    def _is_dropped(self, name: str) -> bool:
        if name in self._numbers:
            return self._numbers[name] in self._gated.dropped
        return name in self._switch.silent


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of what a graph of a block saves, each storage once and without the block's weights.

    What is saved has no graph of its own: a node that held its own output would outlive its block's pass where nothing
    is read back through it, as of the norm before a dropped module.
    """

    def __init__(self, block: nn.Module) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in (*block.parameters(), *block.buffers())}
        self._storages: dict[int, int] = {}
        super().__init__(self._note, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
