"""One batch of candidates on one minibatch: what is run, where, in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evo_hpo.scoring.dense import DenseSide, PackedSide, joined
from evo_hpo.scoring.divergence import Fitness
from evo_hpo.scoring.kept_inputs import Reference, ReferenceStates
from evo_hpo.scoring.pool import ReplicaPool
from evo_hpo.scoring.prefixes import Signature, signature
from evo_hpo.scoring.racing import race
from evo_hpo.scoring.replica import Replica
from evo_hpo.space.compression_space import Assignment

__all__ = ["BatchScorer", "Sums"]

Sums = NDArray[np.float64]
"""Sums over positions of each sequence, nats; NaN: not read; infinite: not finite. Lower is better."""

Batch = tuple[tuple[int, ...], slice]
"""Sequences of the pool, and their columns in the sums."""

Result = tuple[list[int], Batch, Tensor, dict[int, Reference]]


@dataclass
class BatchScorer:
    """Runs candidates on sequences of the pool.

    Attributes:
        tokens: the pool, sequences x length.
        units_of_blocks: for each decoder block, the units inside it.
        dense: what is kept of the uncompressed model, by sequence.
        batch_size: sequences in one forward pass.
        known: complete and partial sums on the last seed's minibatches, in its order of sequences.
    """

    pool: ReplicaPool
    tokens: Tensor
    fitness: Fitness
    units_of_blocks: Sequence[Sequence[int]]
    batch_size: int
    dense_bits: int
    top_k: int
    state_bytes: int
    early_stopping: bool
    reference: ReferenceStates
    dense: dict[int, DenseSide | PackedSide] = field(default_factory=dict)
    known: dict[Assignment, Sums] = field(default_factory=dict)
    known_seed: int | None = None

    def begin(self, seed: int) -> None:
        """Forgets what is known of another seed's minibatches."""
        if seed != self.known_seed:
            self.known, self.known_seed = {}, seed

    def recall(self, assignment: Assignment, sequences: int) -> Sums | None:
        """Complete sums of the first sequences, when an earlier call read them."""
        known = self.known.get(assignment)
        if known is None or len(known) < sequences or np.isnan(known[:sequences]).any():
            return None
        return known[:sequences]

    def evaluate(
        self, todo: Sequence[Assignment], sequences: Sequence[int], keep: int | None, totals: Sequence[float]
    ) -> tuple[Sums, int]:
        """Sums (candidates x sequences) and how many sequences were read for them.

        Args:
            todo: all different, none complete.
            keep: how many, together with those of ``totals``, must be complete; None: all.
            totals: of candidates of the same batch that are complete already.
        """
        size = self.batch_size
        batches = [(tuple(sequences[i : i + size]), slice(i, i + size)) for i in range(0, len(sequences), size)]
        self.make_dense(sequences)
        sums = np.full((len(todo), len(sequences)), np.nan)
        for row, assignment in zip(sums, todo, strict=True):  # a nested minibatch begins with sequences that were read
            earlier = self.known.get(assignment, row[:0])[: len(row)]
            row[: len(earlier)] = earlier
        unread = int(np.isnan(sums).sum())
        head = self.pool.replicas[0].head.weight
        state = len(sequences) * self.tokens.shape[1] * head.shape[1] * head.element_size()
        bring_paths = self.reference.begin(
            (self.known_seed, len(sequences)), len(self.units_of_blocks) * state, len(todo)
        )
        paths: list[dict[tuple[int, ...], Reference]] = [{} for _ in todo]

        def run(candidates: Sequence[int], numbers: Sequence[int]) -> None:
            for members, (batch, columns), values, found in self._run(
                todo, candidates, [batches[n] for n in numbers], sums, bring_paths
            ):
                fetched = values.cpu().numpy()
                fetched[np.isnan(fetched)] = np.inf
                sums[members, columns] = fetched
                for i, reference in found.items():
                    paths[members[i]][batch] = reference

        stoppable = self.early_stopping and len(batches) > 1
        if stoppable and keep is not None and keep < len(todo) + len(totals) and keep <= len(todo):
            race(run, sums, [columns for _, columns in batches], keep, totals)
        else:
            run(range(len(todo)), range(len(batches)))
        for row, path in zip(sums, paths, strict=True):
            if len(path) == len(batches):
                self.reference.offer(float(row.mean()), path)
        self.known.update(zip(todo, sums, strict=True))
        return sums, unread - int(np.isnan(sums).sum())

    def _run(
        self,
        todo: Sequence[Assignment],
        candidates: Sequence[int],
        batches: Sequence[Batch],
        sums: Sums,
        bring_paths: bool,
    ) -> list[Result]:
        """Runs candidates on batches where something is unknown."""
        signatures = {i: signature(todo[i], self.units_of_blocks) for i in candidates}
        order = sorted(candidates, key=signatures.__getitem__)
        whole = len(batches) // len(self.pool) * len(self.pool)
        tasks: list[Callable[[Replica], Result]] = []
        for position, batch in enumerate(batches):
            chosen = [i for i in order if bring_paths or np.isnan(sums[i, batch[1]]).any()]
            parts = 1 if position < whole else min(len(self.pool), len(chosen))
            for part in range(parts):  # batches that do not fill all replicas are split by candidates
                members = chosen[part * len(chosen) // parts : (part + 1) * len(chosen) // parts]
                tasks.append(self._task(todo, members, signatures, batch, bring_paths))
        return self.pool.map(tasks)

    def _task(
        self,
        todo: Sequence[Assignment],
        members: list[int],
        signatures: Mapping[int, Signature],
        batch: Batch,
        bring_paths: bool,
    ) -> Callable[[Replica], Result]:
        def task(replica: Replica) -> Result:
            values, paths = replica.run(
                [todo[i] for i in members],
                [signatures[i] for i in members],
                self.tokens[list(batch[0])],
                None if self.fitness == "perplexity" else joined([self.dense[s] for s in batch[0]]),
                self.state_bytes,
                self.reference.get(batch[0]),
                bring_paths,
            )
            return members, batch, values, paths

        return task

    def make_dense(self, sequences: Sequence[int]) -> None:
        """Adds what is missing of the uncompressed model; one sequence at a time, so that no batch changes its bits."""
        if self.fitness == "perplexity":
            return

        def task(sequence: int) -> Callable[[Replica], tuple[int, DenseSide | PackedSide]]:
            return lambda replica: (sequence, replica.dense(self.tokens[[sequence]], self.dense_bits, self.top_k))

        self.dense.update(self.pool.map([task(s) for s in sequences if s not in self.dense]))
