"""Small spaces and landscapes whose optimum can be listed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from evo_hpo import Assignment, CompressionSpace, Unit

__all__ = ["SIZES", "interacting", "mixed_space", "pruning_space"]

SIZES = (1, 1, 1, 1, 3, 3, 3)


def mixed_space(budget: int = 33) -> CompressionSpace:
    """Seven units in two size groups, levels 2, 3, 4 bits."""
    units = [
        Unit(name=f"layers.{i}.{'qk'[i % 2]}", costs=(2 * s, 3 * s, 4 * s), levels=("2", "3", "4"), size=s)
        for i, s in enumerate(SIZES)
    ]
    return CompressionSpace(units, budget)


def pruning_space(n: int, k: int) -> CompressionSpace:
    """Exactly k of n units dropped."""
    return CompressionSpace([Unit(name=f"layers.{i}.unit", costs=(0, 1)) for i in range(n)], n - k, floor=n - k)


def interacting(n: int, deviation: float, seed: int) -> Callable[[Assignment], float]:
    """Loss of dropping: linear terms gamma(1, 1), pairwise terms normal."""
    rng = np.random.default_rng(seed)
    linear, pairs = rng.gamma(1, 1, n), np.triu(rng.normal(0, deviation, (n, n)), 1)

    def loss(levels: Assignment) -> float:
        dropped = 1.0 - np.asarray(levels)
        return float(linear @ dropped + dropped @ pairs @ dropped)

    return loss
