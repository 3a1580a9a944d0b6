"""The seam between whoever makes compressed weights and whoever runs the model with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from evo_hpo.levels.packing import Encoded
from evo_hpo.space.compression_space import Unit


class Levels(Protocol):
    """Weights of every level of every unit, ready to be swapped in by reference."""

    @property
    def units(self) -> Sequence[Unit]:
        """The units; members are module names as in `model.named_modules()`."""

    @property
    def fingerprint(self) -> str:
        """Identifies the weights: equal fingerprints give equal weights."""

    def weights(self, unit: int, level: int) -> Mapping[str, torch.Tensor | None]:
        """Weights of one level of one unit, in the module's own layout and the compute dtype.

        Returns:
            Module name -> weight (`nn.Linear`: outputs x inputs, `Conv1D`: inputs x outputs), or None where the module
            contributes nothing. A member that is missing from the mapping has its original weight. The tensors belong
            to the store: never write to them.
        """


@runtime_checkable
class StoredLevels(Levels, Protocol):
    """Levels that can also be had as they are stored, to be decoded where they are needed."""

    def encoded(self, unit: int, level: int) -> Mapping[str, Encoded]:
        """Module name -> weight as it is stored, outputs x inputs, of those that are stored compressed."""
