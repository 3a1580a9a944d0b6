"""Order in which candidates are run so that blocks with equal inputs and equal weights run once.

The candidates of a batch form a trie over their blocks' levels. Visited in lexicographic order, each candidate starts
at the first block in which it differs from the one before; the inputs of the blocks at which later candidates branch
off are kept on the way. The number of block passes is the number of nodes of the trie, which is the least possible
without approximation, and no state outlives its subtree.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from evo_hpo.space.compression_space import Assignment

Signature = tuple[tuple[int, ...], ...]
"""For each block, the levels of its units."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One candidate's turn.

    Attributes:
        index: which candidate.
        start: block at which it starts; the input of that block was kept by an earlier visit (0: the embeddings).
        keep: blocks whose input must be kept for later visits.
    """

    index: int
    start: int
    keep: tuple[int, ...]


def signature(assignment: Assignment, units_of_blocks: Sequence[Sequence[int]]) -> Signature:
    """The assignment seen block by block."""
    return tuple(tuple(assignment[u] for u in units) for units in units_of_blocks)


def shared_prefix(first: Signature, second: Signature) -> int:
    """Number of leading blocks in which both agree."""
    for depth, (a, b) in enumerate(zip(first, second, strict=True)):
        if a != b:
            return depth
    return len(first)


def plan_visits(signatures: Sequence[Signature], most_states: int | None = None) -> list[Visit]:
    """Orders candidates (all different) to share prefixes.

    Args:
        most_states: how many block inputs may be kept at once; None: no limit. With fewer than the trie has branching
            depths, an evenly spaced choice is kept and candidates start a little earlier.
    """
    order = sorted(range(len(signatures)), key=lambda i: signatures[i])
    starts = [0, *(shared_prefix(signatures[a], signatures[b]) for a, b in itertools.pairwise(order))]
    allowed = _thin(sorted(set(starts) - {0}), most_states)
    starts = [max((d for d in allowed if d <= s), default=0) for s in starts]
    visits = []
    for position, index in enumerate(order):
        keep, lowest = set(), len(signatures[index])
        for later in starts[position + 1 :]:
            lowest = min(lowest, later)
            if lowest <= starts[position]:
                break
            if later == lowest:
                keep.add(later)
        visits.append(Visit(index, starts[position], tuple(sorted(keep))))
    return visits


def _thin(depths: list[int], most: int | None) -> list[int]:
    if most is None or len(depths) <= most:
        return depths
    return [depths[(2 * i + 1) * len(depths) // (2 * most)] for i in range(most)]
