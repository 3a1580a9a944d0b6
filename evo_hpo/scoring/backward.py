"""One replica's way through the model and back, block by block; several work on sequences of their own.

Each block's graph is one by itself, so that graphs can be freed, or not be kept at all and be made again when their
turn comes. No parameter requires a gradient: :class:`~evo_hpo.scoring.projections.Projector` takes what is asked from
the gradients of the layers' outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evo_hpo.levels.levels import Levels
from evo_hpo.models.gates import GatedModel
from evo_hpo.scoring.arithmetic import InputTypes
from evo_hpo.scoring.decoded import Decoded
from evo_hpo.scoring.head import Chunk, OutputHead
from evo_hpo.scoring.output_gradient import (
    Reference,
    divergence_gradient,
    likelihood_gradient,
    logit_gradients,
    sampled_labels,
)
from evo_hpo.scoring.projections import Projector
from evo_hpo.scoring.segments import Run, SavedBytes, Segment, gradients_within, tell
from evo_hpo.scoring.switching import WeightSwitch
from evo_hpo.search.sensitivities import Form, Kind
from evo_hpo.space.compression_space import Assignment


@dataclass(frozen=True)
class Asked:
    """What is measured; see :meth:`evo_hpo.scoring.sensitivities.SensitivityPass.measure`.

    Attributes:
        seed: of the minibatch.
        parted: also the squares of a sequence's parts.
    """

    assignment: Assignment | None
    kind: Kind
    form: Form
    seed: int
    parted: bool


class BackwardReplica:
    """A replica of the model that takes sequences there (:meth:`begin`) and back (:meth:`through`, :meth:`end`).

    Args:
        model: with the uncompressed weights; it is not changed.
        levels: the weights of each unit's levels; of a model whose blocks are streamed, what brings the decoded ones.
        decoded: the same, shared with other replicas.
        example: token ids for checks of the model.
        chunk: logits that exist at one time.
        stream, inputs: as of the pass.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Levels,
        decoded: Decoded,
        example: Tensor,
        chunk: Chunk,
        stream: torch.device | None,
        inputs: InputTypes | None,
    ) -> None:
        self.gated = GatedModel(model, example, stream)
        self.head = OutputHead(self.gated, example)
        self.head.chunk = chunk
        self._switch = WeightSwitch(self.gated, levels if stream else decoded, example, Lock(), inputs=inputs)
        self._numbers = {name: number for number, name in enumerate(self.gated.blocks)}
        modules = dict(self.gated.model.named_modules())
        members = {name: modules[name] for unit in levels.units for name in unit.members}
        self._projector = Projector(
            decoded, members, self._numbers, self._is_dropped, self.gated.head, waits=stream is None
        )
        shared = self.gated.head.weight
        self._searched_head = next((n for n, m in members.items() if getattr(m, "weight", None) is shared), "")
        self._wholes = [name for name in members if name in self._numbers]
        self._runs: list[Run] = []
        self._recording: Run | None = None  # whose blocks' graphs are being made
        self._graph_bytes, self._largest = 0, 0
        self._sizes = [{id(p): p.numel() for p in block.parameters()} for block in self.gated.blocks.values()]
        self._active: list[int] = []
        self.kept_from = len(self._numbers)
        for name, block in self.gated.blocks.items():
            block.forward = self._segmented(name, block, block.forward)

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self._numbers)

    def begin(self, asked: Asked, ids: Tensor, sequences: tuple[int, ...], batch: int, graph_bytes: int) -> None:
        """Runs the model, up to the gradients of the last block's outputs.

        Args:
            ids: token ids, sequences x length.
            sequences: their numbers in the pool.
            batch: sequences that run together.
            graph_bytes: memory for the graphs of blocks; blocks beyond it run a second time.
        """
        self._runs = [Run(slice(i, min(i + batch, len(ids)))) for i in range(0, len(ids), batch)]
        dense: list[Tensor] = []
        if asked.kind == "kl":
            self._switch.set(None)
            with torch.no_grad():
                dense = [self.gated.final_hidden(ids[run.rows])[0] for run in self._runs]
        self._switch.set(asked.assignment)
        head = self.head.of(self.gated.head.weight.data)  # type: ignore[arg-type]
        self._projector.begin(len(ids), ids.shape[1], asked.form, asked.parted)
        self._graph_bytes, self.kept_from = graph_bytes, 0 if graph_bytes else len(self._numbers)
        self._largest, self._active = 0, self._active_weights()
        finals = [self._forward(run, ids[run.rows]) for run in self._runs]
        for number, (run, final) in enumerate(zip(self._runs, finals, strict=True)):
            self._projector.running(run.rows)
            uniforms = [
                np.random.default_rng([asked.seed, 0x666973, s]).random(ids.shape[1] - 1) for s in sequences[run.rows]
            ]
            with torch.no_grad():
                reference = dense[number] if dense else None
                gradient = self._at_output(
                    head, ids[run.rows], final.detach(), reference, asked.kind, np.concatenate(uniforms)
                )
            noted = [*run.before, *run.after]
            run.gradient = tell(noted, gradients_within(final, gradient, run.segments[-1].tail, noted))
        self._projector.finish()

    def through(self, number: int) -> None:
        """Back through the last block that is left, which is this one."""
        with self.gated.stream.turn(number) if self.gated.stream else nullcontext():
            for run in self._runs:
                self._projector.running(run.rows)
                self._through(run)
            self._projector.finish()

    def end(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Back to the embedding; what :meth:`Projector.end` gives."""
        for run in self._runs:
            if run.front is not None and run.before:
                assert run.gradient is not None
                self._projector.running(run.rows)
                tell(run.before, gradients_within(run.front, run.gradient.to(run.front.device), run.front, run.before))
        self._projector.finish()
        return self._projector.end()

    def forget(self) -> None:
        """Gives back what a pass that ended, or failed, has left."""
        self._runs.clear()
        self._projector.forget()
        self._switch.set(None)

    def _forward(self, run: Run, ids: Tensor) -> Tensor:
        """The input of the output head, with the graph from the last block on; the blocks' graphs are the run's."""
        self._recording = run
        try:
            with torch.enable_grad():
                final = self.gated.final_hidden(ids)[0]
            run.after = self._projector.noted()
            return final
        finally:
            self._recording = None  # a block that runs again makes no new segment

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
            reference = self.head, dense[:, :-1].reshape(hidden.shape)
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

    def _through(self, run: Run) -> None:
        """The gradient of a block's input, from that of its output."""
        segment, gradient = run.segments.pop(), run.gradient
        assert gradient is not None
        output, noted, gradient = segment.output, segment.noted, gradient.to(segment.leaf.device)
        if output is None:
            with torch.enable_grad():
                output = _first(segment.again())
            noted = self._projector.noted()
        if segment.name in self._wholes:
            with torch.no_grad():
                kept = _first(segment.real()) if self._is_dropped(segment.name) else output.detach()
                self._projector.whole(segment.name, kept - segment.leaf, gradient)
        noted = [*run.before, *noted]
        run.gradient = tell(noted, gradients_within(output, gradient, segment.leaf, noted))

    def _segmented(self, name: str, block: nn.Module, gate: Callable[..., Any]) -> Callable[..., Any]:
        """The block's forward, cut off from the one before; ``gate`` passes its input through where it is dropped."""
        number = self._numbers[name]

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._recording is None:
                return gate(*args, **kwargs)
            given = args[0] if args else kwargs["hidden_states"]
            if number == 0:
                self._recording.front, self._recording.before = given, self._projector.noted()
            leaf = given.detach().requires_grad_()
            if args:
                args = (leaf, *args[1:])
            else:
                kwargs["hidden_states"] = leaf
            larger = self._active[number] > self._largest  # than blocks before, so that fewer graphs may fit
            saved = SavedBytes(block) if larger and number >= self.kept_from else None
            if number >= self.kept_from:
                with torch.enable_grad(), saved or nullcontext():
                    output = gate(*args, **kwargs)
            else:
                with torch.no_grad():
                    output = gate(*args, **kwargs)
            if saved:
                self._largest = self._active[number]
                self._keep_fewer(self._graph_bytes // max(saved.bytes * len(self._runs), 1))
            first = _first(output)
            tail = first.detach().requires_grad_()
            real = partial(type(block).forward, block, *args, **kwargs)
            kept = first if number >= self.kept_from else None
            again, noted = partial(gate, *args, **kwargs), self._projector.noted()
            noted = noted if number >= self.kept_from else []  # or they would keep the graph
            self._recording.segments.append(Segment(name, leaf, tail, kept, again, real, noted))
            return (tail, *output[1:]) if isinstance(output, tuple) else tail

        return run

    def _active_weights(self) -> list[int]:
        """Of each block, the weights that are not switched off."""
        gone = {id(p) for name in self._switch.silent for p in self._switch.modules[name].parameters()}
        return [
            0 if number in self.gated.dropped else sum(size for key, size in own.items() if key not in gone)
            for number, own in enumerate(self._sizes)
        ]

    def _keep_fewer(self, graphs: int) -> None:
        """Keeps no more graphs of a run than fit; the last blocks' stay."""
        assert self._recording is not None
        self.kept_from = max(self.kept_from, len(self._numbers) - graphs)
        for segment in self._recording.segments[: self.kept_from]:
            segment.output, segment.noted = None, []

    def _is_dropped(self, name: str) -> bool:
        if name in self._numbers:
            return self._numbers[name] in self.gated.dropped
        return name in self._switch.silent


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
