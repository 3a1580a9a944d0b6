"""Linear layers of one shape, taken together by how their outputs move: starting operations takes a GPU longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from evo_hpo.scoring import devices, weight_changes

WAITING_BYTES = 1 << 29
"""Of inputs, output gradients and levels that wait for layers of the same shape: some blocks of a small model's, or one
block's."""


@dataclass(frozen=True)
class Visit:
    """What a pass left at a layer for one of its units.

    Attributes:
        unit: its number in the space.
        left, right: sequences x positions x rows, or x columns, of the gradient left^T right of the weight.
        place: the weight in place, rows x columns.
        targets: it at each level of the unit, alike.
    """

    unit: int
    left: Tensor
    right: Tensor
    place: Tensor
    targets: Sequence[Tensor]


def are_taken_together(gradient: Tensor) -> bool:
    """Whether layers with such gradients of their outputs wait for others of the same shape."""
    return weight_changes.moves_outputs(gradient) and not devices.has_small_caches(gradient.device)


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
            self._bytes += sum(each.nbytes for each in (left, right, *visit.targets))

    @property
    def are_full(self) -> bool:
        return self._bytes > self._most_bytes

    def take(self) -> Iterator[tuple[list[int], Tensor]]:
        """Units of some visits, and <g_s, target - place> of each: visits x parts of sequences x targets, float32.

        None waits then.
        """
        while self._visits:
            _, visits = self._visits.popitem()
            left, right, levels = visits[0].left, visits[0].right, len(visits[0].targets)
            rows, positions = left.shape[2], left.shape[0] * left.shape[1]
            together, step = weight_changes.output_rows(left.device, levels, rows, positions, right.shape[2])
            blocks = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
            for some in (visits[i : i + together] for i in range(0, len(visits), together)):
                yield [visit.unit for visit in some], self._sums(some, blocks)
        self.forget()

    def forget(self) -> None:
        """Gives back what waits."""
        self._visits.clear()
        self._bytes = 0

    def _sums(self, visits: Sequence[Visit], blocks: Sequence[slice]) -> Tensor:
        """Visits x parts of sequences x targets, some rows of the weights at a time."""
        lefts, rights = (self._by_part(_stacked([getattr(v, side) for v in visits])) for side in ("left", "right"))
        total = torch.zeros((), device=lefts.device)
        for rows in blocks:
            whole = len(blocks) == 1  # a slice of all rows would be started for nothing
            changes = torch.stack([t if whole else t[rows] for v in visits for t in v.targets])
            places = torch.stack([v.place if whole else v.place[rows] for v in visits])
            changes = changes.view(len(visits), -1, *places.shape[1:]).sub_(places.unsqueeze(1))
            sums = weight_changes.moved_sums(lefts if whole else lefts[..., rows], rights, changes)
            total = sums if whole else total + sums
        return total

    def _by_part(self, values: Tensor) -> Tensor:
        """Visits x parts of sequences x positions x width; zeros fill the last part of a sequence."""
        count, sequences, length, width = values.shape
        each = -(-length // self._parts)
        if missing := each * self._parts - length:
            values = pad(values, (0, 0, 0, missing))
        return values.reshape(count, sequences * self._parts, each, width)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One alone is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack([*tensors])
