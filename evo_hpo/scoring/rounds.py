"""Which candidates are read on which sequences, and what is charged for it; wherever the reading is done.

A minibatch is a row of sequences, and a candidate's sum on one of them depends on nothing else but, in its last bits,
on the sequences that are read in the same pass. So what is known is kept by sequence and pass, nested minibatches are
read on, and candidates that cannot be among the best are stopped, alike for a model in this process and for models on
other machines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evo_hpo.scoring.early_stopping import complete_best
from evo_hpo.search.problem import Score
from evo_hpo.space.compression_space import Assignment

Sums = NDArray[np.float64]
"""Sums over positions of each sequence, nats; NaN: not read; infinite: not finite. Lower is better."""

Group = tuple[tuple[int, ...], slice]
"""Sequences of the pool that are read in one pass, and their columns in the sums."""

Ends = NDArray[np.int64]
"""Of each sequence of a minibatch, the column after the last one of the pass that it is read in."""

Read = Callable[[Sequence[Assignment], Sequence[int], Sequence[Group], Sums], None]
"""Reads some of the candidates (by number) on groups of sequences and fills their rows of the sums."""


COUNTED = ("candidates", "cached", "stopped", "tokens", "non_finite", "out_of_memory")
"""What an evaluator counts from its making on."""


def groups_of(sequences: Sequence[int], size: int) -> list[Group]:
    """The sequences in passes of at most ``size``."""
    ends = [(i, min(i + size, len(sequences))) for i in range(0, len(sequences), size)]
    return [(tuple(sequences[a:b]), slice(a, b)) for a, b in ends]


def _ends(groups: Sequence[Group]) -> Ends:
    return np.repeat([columns.stop for _, columns in groups], [len(members) for members, _ in groups])


def scored(sums: Sums, length: int) -> Score:
    """The score that a candidate's sums make; ``length``: tokens of a sequence."""
    read = int((~np.isnan(sums)).sum())
    loss = float(np.nansum(sums)) / (len(sums) * (length - 1))
    if not math.isfinite(loss):
        return Score(math.inf, read * length, reason="the loss is not finite")
    if read < len(sums):
        return Score(loss, read * length, stopped=True)
    return Score(loss, read * length, by_sequence=tuple((sums / (length - 1)).tolist()))


_NOTHING: tuple[Sums, Ends] = np.zeros(0), np.zeros(0, dtype=np.int64)


def counted(new: Sequence[Sums], read: int, length: int) -> dict[str, int]:
    """What a report counts of candidates that were read: ``read`` sequences of so many tokens in all."""
    return {
        "candidates": len(new),
        "tokens": read * length,
        "stopped": sum(bool(np.isnan(sums).any()) for sums in new),
        "non_finite": sum(bool(np.isinf(sums).any()) for sums in new),
    }


@dataclass
class Rounds:
    """What is known on the last seed's minibatches, and the order in which the rest is read.

    What is known saves time and decides nothing: which candidates are stopped, and what is charged, follows from the
    batch alone, whatever this process has scored before.

    Attributes:
        early_stopping: with ``keep``, stop candidates that are provably not among the best; exact.
        known: complete and partial sums on the last seed's minibatches, in its order of sequences, and their passes.
        seed: that seed.
    """

    early_stopping: bool
    known: dict[Assignment, tuple[Sums, Ends]] = field(default_factory=dict)
    seed: int | None = None

    def known_of(
        self,
        assignments: Sequence[Assignment],
        seed: int,
        groups: Sequence[Group],
        keep: int | None,
        elsewhere: Callable[[Assignment], Sums | None] = lambda _: None,
    ) -> tuple[dict[Assignment, Sums], list[Assignment], int | None]:
        """Complete sums that are known of a minibatch, the assignments for :meth:`read`, each once, and of these how
        many must be complete; None: all.

        Where some may be stopped, these are all assignments, also those whose sums are known: they may be stopped too.
        What is known of another seed's minibatches is forgotten. ``elsewhere`` is asked for what is not known here.
        """
        if seed != self.seed:
            self.known, self.seed = {}, seed
        found: dict[Assignment, Sums] = {}
        todo: list[Assignment] = []
        distinct = dict.fromkeys(tuple(map(int, a)) for a in assignments)
        ends = _ends(groups)
        for assignment in distinct:
            sums: Sums | None = self._known_in(assignment, ends)
            if sums is None or len(sums) < len(ends) or np.isnan(sums).any():
                sums = elsewhere(assignment)
                if sums is not None:
                    self._note(assignment, sums, ends)
            if sums is None:
                todo.append(assignment)
            else:
                found[assignment] = sums
        if self.early_stopping and len(groups) > 1 and keep is not None and keep < len(distinct):
            return found, [*distinct], keep
        return found, todo, None

    def _known_in(self, assignment: Assignment, ends: Ends) -> Sums:
        """What is known of a minibatch's first sequences; NaN where they were read in other passes than its own."""
        sums, own = self.known.get(assignment, _NOTHING)
        both = min(len(sums), len(ends))
        return np.where(own[:both] == ends[:both], sums[:both], np.nan)

    def _note(self, assignment: Assignment, sums: Sums, ends: Ends) -> None:
        """Keeps what was read, beside what is known of the same and of later sequences."""
        known, own = self.known.get(assignment, _NOTHING)
        both, later = min(len(known), len(sums)), known if len(known) > len(sums) else sums
        unread = np.isnan(sums[:both])
        start, passes = np.where(unread, known[:both], sums[:both]), np.where(unread, own[:both], ends[:both])
        more = own if later is known else ends
        self.known[assignment] = np.concatenate([start, later[both:]]), np.concatenate([passes, more[both:]])

    def read(
        self, todo: Sequence[Assignment], groups: Sequence[Group], keep: int | None, read: Read
    ) -> tuple[Sums, int]:
        """Sums (candidates x sequences) and how many sequences were read for them.

        Args:
            todo, keep: as of :meth:`known_of`.
        """
        sums = np.full((len(todo), sum(len(sequences) for sequences, _ in groups)), np.nan)
        ends = _ends(groups)
        known, count = [self._known_in(assignment, ends) for assignment in todo], 0

        def run(candidates: Sequence[int], numbers: Sequence[int]) -> None:
            nonlocal count
            wanted = [groups[n] for n in numbers]
            unread = dict.fromkeys(candidates, 0)
            for i in candidates:
                for _, columns in wanted:  # a nested minibatch begins with sequences that were read
                    earlier = known[i][columns]
                    sums[i, columns.start : columns.start + len(earlier)] = earlier
                    unread[i] += int(np.isnan(sums[i, columns]).sum())
            if lacking := [i for i, number in unread.items() if number]:
                read(todo, lacking, wanted, sums)
            count += sum(unread.values())

        if keep is None or len(groups) == 1:
            run(range(len(todo)), range(len(groups)))
        else:
            complete_best(run, sums, [columns for _, columns in groups], keep)
        for assignment, row in zip(todo, sums, strict=True):
            self._note(assignment, row, ends)
        return sums, count
