"""A loss of level vectors with pairwise terms, and its derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np

from evo_hpo.space.compression_space import Assignment


class Landscape:
    """Loss of level vectors: ``sum_u g_u e_u + sum_{u<v} z_uv sqrt(e_u e_v)``, e the error of the unit's level.

    Args:
        errors: error of each unit's levels (units x levels).
        sensitivities: g, one a unit.
        pairs: z, units x units; only the upper triangle counts.
    """

    def __init__(
        self, errors: np.ndarray[Any, Any], sensitivities: np.ndarray[Any, Any], pairs: np.ndarray[Any, Any] | None
    ) -> None:
        self.errors = errors
        self.roots = np.sqrt(errors)
        self.sensitivities = sensitivities
        self.pairs = None if pairs is None else np.triu(pairs, 1)
        self._rows = np.arange(len(errors))

    def __call__(self, levels: Assignment, scale: np.ndarray[Any, Any] | float = 1.0) -> float:
        """The loss; ``scale`` multiplies the sensitivities."""
        index = list(levels)
        loss = float((self.errors[self._rows, index] * self.sensitivities * scale).sum())
        if self.pairs is not None:
            roots = self.roots[self._rows, index]
            loss += float(roots @ self.pairs @ roots)
        return loss

    def apart(self, levels: Assignment, changes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """How much more or less the loss is when ``changes`` (sequences x units) add to what scales sensitivities."""
        return np.asarray(changes @ (self.errors[self._rows, list(levels)] * self.sensitivities))

    def of_many(self, levels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Losses of the rows of an array (assignments x units)."""
        losses = np.asarray((self.errors[self._rows, levels] * self.sensitivities).sum(axis=1))
        if self.pairs is not None:
            roots = self.roots[self._rows, levels]
            losses += ((roots @ self.pairs) * roots).sum(axis=1)
        return losses

    def curvature(self) -> np.ndarray[Any, Any]:
        """Second derivatives of the loss in the roots of the errors, units x units."""
        pairs = 0.0 if self.pairs is None else self.pairs + self.pairs.T
        return np.asarray(2 * np.diag(self.sensitivities) + pairs)

    def effects(self) -> list[list[float]]:
        """Additive part: loss of each unit's levels."""
        return [(e * g).tolist() for e, g in zip(self.errors, self.sensitivities, strict=True)]
