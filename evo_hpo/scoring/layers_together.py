"""Linear layers of one shape, whose changes are taken together: starting operations is what takes a GPU longest.

A layer's change moves its outputs: <g_s, change> with g_s = left_s^T right_s is also the sum over a sequence's
positions of left . (change right). The weight gradients of every part of every sequence are far larger than those
outputs, and to write and read them took a GPU longer than all else; products of 16-bit numbers take it next to no time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from evo_hpo.scoring import weight_changes

WAITING_BYTES = 1 << 28
"""Of inputs and output gradients that wait for layers of the same shape: some blocks of a small model."""

OUTPUTS = 1 << 27
"""Moved outputs, and changed weights, that exist at one time (0.3 GB of 16-bit numbers each): rows of a large model's
layers are taken by so many."""


@dataclass(frozen=True)
class Visit:
    """What a pass left at a layer for one of its units.

    Attributes:
        left, right: sequences x positions x rows, or x columns, of the gradient left^T right of the weight.
        place: the weight in place, rows x columns.
        targets: it at each level of the unit, alike.
    """

    unit: int
    left: Tensor
    right: Tensor
    place: Tensor
    targets: Sequence[Tensor]


def suits(gradient: Tensor) -> bool:
    """Whether layers with such gradients are better taken together."""
    return gradient.dtype in (torch.bfloat16, torch.float16) and not weight_changes.has_small_caches(gradient.device)


class LayersTogether:
    """Visits of one pass, kept until there are enough of them.

    Args:
        parts: of each sequence, whose sums are wanted.
        most_bytes: that wait; 0: whatever waits is full.
    """

    def __init__(self, parts: int, most_bytes: int = WAITING_BYTES) -> None:
        self._parts, self._most_bytes = parts, most_bytes
        self._visits: dict[object, list[Visit]] = {}
        self._bytes = 0

    def add(self, visits: Sequence[Visit]) -> None:
        """Keeps those of one layer."""
        for visit in visits:
            left, right = visit.left, visit.right
            key = (left.device, left.dtype, left.shape, right.shape, len(visit.targets))
            self._visits.setdefault(key, []).append(visit)
            self._bytes += left.nbytes + right.nbytes

    @property
    def are_full(self) -> bool:
        return self._bytes > self._most_bytes

    def take(self) -> Iterator[tuple[list[int], Tensor]]:
        """Units of some visits, and <g_s, target - place> of each: visits x parts of sequences x targets, float32.

        None waits then.
        """
        for visits in self._visits.values():
            first = visits[0]
            positions, rows = first.left.shape[0] * first.left.shape[1], first.left.shape[2]
            each = len(first.targets) * rows * max(positions, first.right.shape[2])
            together = max(1, OUTPUTS // each)
            for some in (visits[i : i + together] for i in range(0, len(visits), together)):
                step = min(rows, max(1, OUTPUTS * rows // each))
                blocks = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
                yield [visit.unit for visit in some], self._sums(some, blocks)
        self.forget()

    def forget(self) -> None:
        """Gives back what waits."""
        self._visits.clear()
        self._bytes = 0

    def _sums(self, visits: Sequence[Visit], blocks: Sequence[slice]) -> Tensor:
        """Visits x parts of sequences x targets, some rows of the weights at a time."""
        lefts, rights = (self._by_part(torch.stack([getattr(v, side) for v in visits])) for side in ("left", "right"))
        count, parts, positions, columns = rights.shape
        levels = len(visits[0].targets)
        total = torch.zeros((), device=lefts.device)
        for rows in blocks:
            height = rows.stop - rows.start
            whole = len(blocks) == 1  # a slice of all rows would be started for nothing
            changes = torch.stack([t if whole else t[rows] for v in visits for t in v.targets])
            places = torch.stack([v.place if whole else v.place[rows] for v in visits])
            changes = changes.view(count, levels, height, columns).sub_(places.unsqueeze(1))
            changes = changes.view(count, levels * height, columns).transpose(1, 2)
            moved = torch.bmm(rights.view(count, parts * positions, columns), changes)
            moved = moved.view(count, parts, positions, levels, height)
            moved *= (lefts if whole else lefts[..., rows]).unsqueeze(3)
            sums = moved.sum(dim=(2, 4), dtype=torch.float32)
            total = sums if whole else total + sums
        return total

    def _by_part(self, values: Tensor) -> Tensor:
        """Visits x parts of sequences x positions x width; zeros fill the last part of a sequence."""
        count, sequences, length, width = values.shape
        each = -(-length // self._parts)
        if missing := each * self._parts - length:
            values = pad(values, (0, 0, 0, missing))
        return values.view(count, sequences * self._parts, each, width)
