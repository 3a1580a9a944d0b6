"""How far losses on single sequences differ by chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LARGEST = 1e150
"""Larger differences count as this: sums of their squares are still numbers."""


class Noise:
    """How much a difference of losses varies from sequence to sequence, for each unit that is changed."""

    def __init__(self) -> None:
        self._squares, self._freedom, self._guesses = 0.0, 0, list[float]()

    def learn(self, differences: Sequence[float], changed: int) -> None:
        """Differences of one assignment's losses, a sequence each, with so many changed units."""
        clipped = np.clip(differences, -LARGEST, LARGEST)
        if len(differences) > 1:
            self._squares += float(np.var(clipped)) * len(differences) / changed
            self._freedom += len(differences) - 1
        else:  # of a single one, half is taken for noise until something better is known
            self._guesses.append(float(clipped[0]) ** 2 / 2 / changed)

    @property
    def variance(self) -> float:
        """Of a sequence's difference, for each unit that is changed; 0 before anything was learnt."""
        if self._freedom:
            return self._squares / self._freedom
        return float(np.mean(self._guesses)) if self._guesses else 0.0
