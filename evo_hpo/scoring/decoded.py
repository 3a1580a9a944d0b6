"""Levels that several threads read, each decoded once."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock

from torch import Tensor

from evo_hpo.levels.levels import Levels


class Decoded:
    """Levels, each decoded by whoever of several threads asks first, and kept until all are given back."""

    def __init__(self, levels: Levels) -> None:
        self.units, self.fingerprint = levels.units, levels.fingerprint
        self._levels, self._lock = levels, Lock()
        self._weights: dict[tuple[int, int], Mapping[str, Tensor | None]] = {}

    def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
        """See `Levels`."""
        with self._lock:
            return self._of(unit, level)

    def of(self, unit: int) -> list[Mapping[str, Tensor | None]]:
        """Member -> weight of each level of one unit."""
        with self._lock:
            return [self._of(unit, level) for level in range(len(self.units[unit].costs))]

    def _of(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
        key = (unit, level)
        if key not in self._weights:
            self._weights[key] = self._levels.weights(unit, level)
        return self._weights[key]

    def forget(self) -> None:
        """Gives them back."""
        self._weights.clear()
