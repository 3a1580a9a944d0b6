"""One batch of candidates on one minibatch: what is run, where, in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from evo_hpo.scoring.dense import DenseSide, PackedSide, joined
from evo_hpo.scoring.divergence import Fitness
from evo_hpo.scoring.kept_inputs import KeptPath, KeptPaths
from evo_hpo.scoring.pool import ReplicaPool
from evo_hpo.scoring.prefixes import Signature, signature
from evo_hpo.scoring.replica import Replica
from evo_hpo.scoring.rounds import Group, Rounds, Sums, groups_of
from evo_hpo.space.compression_space import Assignment

GroupSums = tuple[list[int], Group, Tensor, dict[int, KeptPath]]


@dataclass
class BatchScorer:
    """Runs candidates on sequences of the pool.

    Attributes:
        tokens: the pool, sequences x length.
        units_of_blocks: for each decoder block, the units inside it.
        dense: what is kept of the uncompressed model, by sequence.
        batch_size: sequences in one forward pass.
        rounds: what is known of earlier batches, and what is read next.
        packs: whether replicas may pack weights.
        most: sequences that memory suffices for in one pass, since it ran out; None: it has not.
    """

    pool: ReplicaPool
    tokens: Tensor
    fitness: Fitness
    units_of_blocks: Sequence[Sequence[int]]
    batch_size: int
    dense_bits: int
    top_k: int
    state_bytes: int
    rounds: Rounds
    reference: KeptPaths
    packs: bool
    most: int | None = None
    dense: dict[int, DenseSide | PackedSide] = field(default_factory=dict)

    def evaluate(self, todo: Sequence[Assignment], sequences: Sequence[int], keep: int | None) -> tuple[Sums, int]:
        """Sums (candidates x sequences) and how many sequences were read for them.

        Args:
            todo, keep: as of :meth:`Rounds.known_of`.
        """
        groups = groups_of(sequences, self.batch_size)
        self.make_dense(sequences)
        head = self.pool.replicas[0].head
        state = len(sequences) * self.tokens.shape[1] * head.weight.shape[1] * head.dtype.itemsize
        bring_paths = self.reference.begin(
            (self.rounds.seed, len(sequences)), len(self.units_of_blocks) * state, len(todo)
        )
        paths: list[dict[tuple[int, ...], KeptPath]] = [{} for _ in todo]

        def read(_: Sequence[Assignment], candidates: Sequence[int], parts: Sequence[Group], sums: Sums) -> None:
            for members, group, found in self._run(todo, candidates, parts, sums, bring_paths):
                for i, reference in found.items():
                    paths[members[i]][group[0]] = reference

        sums, count = self.rounds.read(todo, groups, keep, read)
        for row, path in zip(sums, paths, strict=True):
            if len(path) == len(groups):
                self.reference.offer(float(row.mean()), path)
        return sums, count

    def read(self, assignments: Sequence[Assignment], groups: Sequence[Sequence[int]]) -> Sums:
        """Sums of all the assignments on these groups of sequences, which nothing else decides.

        Groups are taken apart only where memory has run out.
        """
        self.make_dense([s for group in groups for s in group])
        fitting = [part for group in groups for part, _ in groups_of(group, self.most or len(group))]
        ends = np.cumsum([0, *map(len, fitting)])
        parts = [(part, slice(int(a), int(b))) for part, a, b in zip(fitting, ends, ends[1:], strict=False)]
        sums = np.full((len(assignments), int(ends[-1])), np.nan)
        self._run(assignments, range(len(assignments)), parts, sums, False)
        return sums

    def give_up(self) -> bool:
        """Halves the sequences of a pass; where they are single, keeps no block inputs and no packed weights.

        Returns:
            False where there is nothing more to give up.
        """
        self.reference.clear()  # or the minibatch would pass for one that is used again, whose paths are kept
        if self.batch_size > 1:
            self.batch_size //= 2
            self.most = self.batch_size
        elif self.most != 1 or self.state_bytes or self.reference.limit or self.packs:
            self.most, self.state_bytes, self.reference.limit, self.packs = 1, 0, 0, False
            for replica in self.pool.replicas:
                replica.forget_packed()
        else:
            return False
        return True

    def _run(
        self,
        todo: Sequence[Assignment],
        candidates: Sequence[int],
        batches: Sequence[Group],
        sums: Sums,
        bring_paths: bool,
    ) -> list[tuple[list[int], Group, dict[int, KeptPath]]]:
        """Runs candidates on batches where something is unknown, and fills their sums in; with the paths they took."""
        signatures = {i: signature(todo[i], self.units_of_blocks) for i in candidates}
        order = sorted(candidates, key=signatures.__getitem__)
        whole = len(batches) // len(self.pool) * len(self.pool)
        tasks: list[Callable[[Replica], GroupSums]] = []
        for position, batch in enumerate(batches):
            chosen = [i for i in order if bring_paths or np.isnan(sums[i, batch[1]]).any()]
            parts = 1 if position < whole else min(len(self.pool), len(chosen))
            for part in range(parts):  # batches that do not fill all replicas are split by candidates
                members = chosen[part * len(chosen) // parts : (part + 1) * len(chosen) // parts]
                tasks.append(self._task(todo, members, signatures, batch, bring_paths))
        done = []
        for members, batch, values, paths in self.pool.map(tasks):
            fetched = values.cpu().numpy()
            fetched[np.isnan(fetched)] = np.inf
            sums[members, batch[1]] = fetched
            done.append((members, batch, paths))
        return done

    def _task(
        self,
        todo: Sequence[Assignment],
        members: list[int],
        signatures: Mapping[int, Signature],
        batch: Group,
        bring_paths: bool,
    ) -> Callable[[Replica], GroupSums]:
        def task(replica: Replica) -> GroupSums:
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
