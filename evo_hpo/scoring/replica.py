"""One replica of the model that runs candidates on a few sequences; several can work side by side, one thread each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from evo_hpo.models.gates import GatedModel
from evo_hpo.scoring.dense import DenseSide, PackedSide
from evo_hpo.scoring.divergence import Fitness, cross_entropies, dense_side, divergences
from evo_hpo.scoring.head import OutputHead
from evo_hpo.scoring.kept_inputs import KeptPath
from evo_hpo.scoring.prefixes import Signature, plan_visits, shared_prefix
from evo_hpo.scoring.switching import WeightSwitch
from evo_hpo.space.compression_space import Assignment


@dataclass
class Timing:
    """Where time went (seconds) and how many block passes prefix sharing saved (sequences x blocks)."""

    body: float = 0.0
    head: float = 0.0
    switching: float = 0.0
    blocks_run: int = 0
    blocks_shared: int = 0

    def add(self, other: Timing) -> None:
        """Adds another record to this one."""
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))


@dataclass
class Replica:
    """A gated replica with its level switch.

    Attributes:
        fitness: what :meth:`run` sums up over a sequence's predicted positions (all but the last token).
        group: candidates whose final hidden states wait for one pass over the uncompressed model's logits.
        batch: sequences x length of the passes that weights are packed for; (0, 0): of none.
    """

    gated: GatedModel
    switch: WeightSwitch
    head: OutputHead
    fitness: Fitness
    group: int = 16
    timing: Timing = field(default_factory=Timing)
    batch: tuple[int, int] = (0, 0)

    def place(self, assignment: Assignment | None, ids: Tensor) -> None:
        """Sets the levels for a pass over these sequences; None: the uncompressed model.

        Weights that stay in place from call to call get packed, if the sequences are as many as was said.
        """
        sequences, length = self.batch
        expected = ids.shape == self.batch
        if expected:
            self.switch.expect(sequences * length)
            self.head.expect(sequences * (length - 1))
        self.switch.set(assignment, pack=expected)

    def dense(self, ids: Tensor, bits: int, top_k: int, fitness: Fitness | None = None) -> DenseSide | PackedSide:
        """What must be kept of the uncompressed model for these sequences."""
        with torch.inference_mode():
            self.place(None, ids)
            final, _ = self.gated.final_hidden(ids)
            return dense_side(self.head, _flat(final), fitness or self.fitness, bits, top_k)

    def run(
        self,
        assignments: Sequence[Assignment],
        signatures: Sequence[Signature],
        ids: Tensor,
        dense: DenseSide | None,
        state_bytes: int,
        reference: KeptPath | None = None,
        bring_paths: bool = False,
    ) -> tuple[Tensor, dict[int, KeptPath]]:
        """Runs candidates, each from the first block that no earlier one (or the reference) has run alike.

        Args:
            assignments: all different.
            signatures: the same, block by block.
            ids: token ids, sequences x length.
            dense: of these sequences; None for perplexity.
            state_bytes: memory for block inputs that are kept for later candidates.
            reference: block inputs of an earlier assignment on the same sequences.
            bring_paths: also return every candidate's block inputs.

        Returns:
            Sum of the fitness over each sequence's positions, nats, float64, candidates x sequences (lower is better);
            and candidate -> path, empty unless asked for.
        """
        sums = torch.empty(len(assignments), len(ids), dtype=torch.float64, device=ids.device)
        paths: dict[int, KeptPath] = {}
        waiting: list[tuple[int, Tensor]] = []
        head = self.head
        group = 1 if self.head.linear else self.group
        states: dict[int, Tensor] = {}
        one_state = ids.numel() * self.head.weight.shape[1] * self.head.dtype.itemsize
        with torch.inference_mode():
            for visit in plan_visits(signatures, state_bytes // one_state):
                begin = time.perf_counter()
                self.place(assignments[visit.index], ids)
                if (own_head := self._own_head()).weight.data_ptr() != head.weight.data_ptr():
                    self._settle(waiting, ids, dense, sums, head)
                    head = own_head
                switched = time.perf_counter()
                own = signatures[visit.index]
                start = visit.start
                if (
                    reference is not None
                    and (shared := min(shared_prefix(reference.signature, own), len(own) - 1)) > start
                ):
                    states |= {d: s for d, s in reference.path.items() if start < d <= shared}
                    start = shared
                keep = range(max(start, 1), len(own)) if bring_paths else visit.keep
                final, kept = self.gated.final_hidden(ids, start, states.get(start), keep)
                states = {depth: s for depth, s in states.items() if depth <= start} | kept
                if bring_paths:
                    paths[visit.index] = KeptPath(own, dict(states))
                waiting.append((visit.index, final))
                self._count(switched - begin, time.perf_counter() - switched, start, len(ids))
                if len(waiting) == group:
                    self._settle(waiting, ids, dense, sums, head)
            self._settle(waiting, ids, dense, sums, head)
        return sums, paths

    def both(self, assignment: Assignment | None, ids: Tensor, dense: DenseSide | PackedSide) -> Tensor:
        """KL divergence and cross-entropy summed over each sequence's positions, nats, float64, 2 x sequences."""
        with torch.inference_mode():
            self.place(assignment, ids)
            final = _flat(self.gated.final_hidden(ids)[0])
            head = self._own_head()
            divergence = divergences(self.head, [final], dense.open(), head)[0]
            loss = cross_entropies(head, final, ids[:, 1:].reshape(-1))
            return torch.stack([x.view(len(ids), -1).sum(-1) for x in (divergence, loss)])

    def forget_packed(self) -> None:
        """Gives the memory of packed weights back, for good."""
        for packed in (self.switch.packed, self.head.packed):
            packed.limit = 0
            packed.clear()

    def _own_head(self) -> OutputHead:
        """The head with the weights in place."""
        weight = self.gated.head.weight
        assert isinstance(weight, Tensor)
        return self.head.of(weight.data)

    def _settle(
        self,
        waiting: list[tuple[int, Tensor]],
        ids: Tensor,
        dense: DenseSide | None,
        sums: Tensor,
        head: OutputHead,
    ) -> None:
        """Adds up what candidates lose that have the same head."""
        if not waiting:
            return
        start = time.perf_counter()
        finals = [_flat(final) for _, final in waiting]
        if dense is None:
            values = [cross_entropies(head, f, ids[:, 1:].reshape(-1)) for f in finals]
        else:
            values = divergences(self.head, finals, dense, head)
        for (index, _), value in zip(waiting, values, strict=True):
            sums[index] = value.view(len(ids), -1).sum(-1)
        waiting.clear()
        self.timing.head += time.perf_counter() - start

    def _count(self, switching: float, body: float, start: int, sequences: int) -> None:
        self.timing.switching += switching
        self.timing.body += body
        self.timing.blocks_shared += start * sequences
        self.timing.blocks_run += (len(self.gated) - start) * sequences


def _flat(final: Tensor) -> Tensor:
    """Positions that predict a token of the sequence, as one list: (sequences x (length - 1)) x hidden."""
    return final[:, :-1].reshape(-1, final.shape[-1])
