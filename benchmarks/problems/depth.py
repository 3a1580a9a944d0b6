"""Depth landscapes: every way to drop a number of decoder blocks, or of pairs of consecutive blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit

if TYPE_CHECKING:
    from torch import Tensor


def depth_space(blocks: int, size: int, drop: int, prefix: str = "model.layers") -> CompressionSpace:
    """Exactly ``drop`` of the units are dropped; a unit is ``size`` consecutive blocks, its levels dropped and kept.

    Args:
        blocks: decoder blocks of the model, a multiple of ``size``.
        size: 1, or 2 for pairs of consecutive blocks.
        drop: units that are dropped, no more and no fewer.
    """
    units = [
        Unit(
            f"{prefix}.{first}" if size == 1 else f"pairs.{first // size}",
            costs=(0, 1),
            group="block",
            levels=("dropped", "kept"),
            members=tuple(f"{prefix}.{first + i}" for i in range(size)),
        )
        for first in range(0, blocks, size)
    ]
    kept = len(units) - drop
    return CompressionSpace(units, kept, floor=kept, resources=("modules",))


class DropBlocks:
    """Levels of a depth space: nothing is stored, a dropped block passes its input on."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = tuple(units)
        self.fingerprint = f"drop {len(self.units)} x {len(self.units[0].members)}"

    def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
        """Nothing where dropped, the original where kept."""
        return dict.fromkeys(self.units[unit].members) if level == 0 else {}


def ways_to_drop(units: int, counts: Iterable[int]) -> list[Assignment]:
    """All assignments with so many of the units dropped, in lexicographic order.

    Neighbours in this order share their first blocks, which the evaluator then runs once.
    """
    return sorted(dropped(units, chosen) for count in counts for chosen in itertools.combinations(range(units), count))


def dropped(units: int, chosen: Iterable[int]) -> Assignment:
    """The assignment that drops the chosen units."""
    gone = set(chosen)
    return tuple(int(unit not in gone) for unit in range(units))
