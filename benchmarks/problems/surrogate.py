"""A smooth function through measured assignments: what the landscape says where nothing was measured.

A Gaussian process on the logarithm of the KL divergence. Each unit's level has two features: its quantization energy
4^(3 - bits), relative to 3 bits, and whether it is above 3 bits. Effects of units are alike a priori when they share a
role, when their blocks are near, or both; interactions are the square of the same kernel, so that pairs of units that
matter interact. With the features known, the process is a quadratic form, which is what is evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evo_hpo.space.compression_space import Assignment, CompressionSpace

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Features:
    """Features of every unit's levels, and how alike two units are a priori.

    Attributes:
        table: units x levels x features.
        parts: covariances of unit effects (units x units) that hyperparameters weigh: all alike, same role, near
            blocks, both, each its own.
    """

    table: Array
    parts: tuple[Array, ...]

    @classmethod
    def of(cls, space: CompressionSpace) -> Features:
        """From levels that are bits, and names that give block and role."""
        bits = np.array([[float(label) for label in unit.levels] for unit in space.units])
        scale = np.sqrt(np.array([unit.size for unit in space.units]) / space.total_size)
        table = np.stack([4.0 ** (3 - bits) - 1, np.minimum(bits - 3, 1.0) * (bits > 3)], axis=-1)
        roles = [unit.role for unit in space.units]
        blocks = np.array([unit.block or 0 for unit in space.units])
        role = np.array([[float(a == b) for b in roles] for a in roles])
        near = np.exp(-np.abs(blocks[:, None] - blocks[None, :]) / 4.0)
        own = np.eye(len(roles))
        parts = tuple(part * np.outer(scale, scale) for part in (np.ones_like(role), role, near, role * near, own))
        return cls(table, parts)

    def rows(self, levels: NDArray[np.integer[Any]]) -> Array:
        """Features of assignments: assignments x features x units."""
        units = np.arange(self.table.shape[0])
        return np.moveaxis(self.table[units, levels], -1, 1)

    def covariance(self, first: Array, second: Array, weights: Array) -> Array:
        """Prior covariance of additive effects; ``weights``: features x parts, not negative."""
        total = np.zeros((len(first), len(second)))
        for f, of_feature in enumerate(weights):
            alike = sum(w * part for w, part in zip(of_feature, self.parts, strict=True))
            total += first[:, f] @ alike @ second[:, f].T
        return total


@dataclass(frozen=True)
class Fit:
    """A fitted process as a quadratic form: log KL = constant + linear . g + g . quadratic . g, g the features.

    Attributes:
        constant, linear, quadratic: of the flattened features (features x units).
    """

    features: Features
    constant: float
    linear: Array
    quadratic: Array

    def many(self, levels: NDArray[np.integer[Any]]) -> Array:
        """Predicted log KL of the rows of an array (assignments x units)."""
        g = self.features.rows(levels).reshape(len(levels), -1)
        return np.asarray(self.constant + g @ self.linear + ((g @ self.quadratic) * g).sum(axis=1))

    def __call__(self, assignment: Assignment) -> float:
        """Predicted KL(dense || compressed), nats a token; lower is better."""
        g = self.features.table[np.arange(len(assignment)), assignment].T.ravel()
        return float(np.exp(self.constant + g @ self.linear + g @ (self.quadratic @ g)))
