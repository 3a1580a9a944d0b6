"""The additive model of the loss with a table of predicted effects as its prior, believed as far as measurements do.

Two parts are added to the prior of :class:`~searchers.additive.model.AdditiveModel`: the table as a whole, times one
unknown number, and a deviation of every step in proportion to what the table says of it. How much of the prior variance
each part holds is chosen by the marginal likelihood of the measured rows, "none" among the choices: a table that
foretells nothing then costs no more than the one number that it adds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.forecast import Forecast
from searchers.additive.model import SHARES, AdditiveModel, Array
from searchers.additive.one_shot import effects_of

BLENDS = ((0.0, 1.0, 0.02), (0.0, 1.0, 0.2), (0.05, 1.0, 0.2), (0.2, 1.0, 0.2), (0.5, 0.2, 0.0))
"""Shares of the black-box prior, of the table as a whole, and of the deviations from it."""


class InformedModel(AdditiveModel):
    """Posterior over the loss of every unit's levels, from a table of predictions and measured differences.

    Args:
        space, memory, outlier: see :class:`~searchers.additive.model.AdditiveModel`.

    Attributes:
        trusted: whether the rows speak for the table; True before any row.
    """

    def __init__(self, space: CompressionSpace, *, memory: int = 600, outlier: float = 20.0) -> None:
        super().__init__(space, memory=memory, outlier=outlier)
        self._told = np.zeros(len(self._unit))
        self.trusted = True

    def inform(self, table: Array) -> None:
        """Takes predicted losses (units x levels, nats a token; what is not finite says nothing) as the prior."""
        steps = table[self._unit, self._step] - table[self._unit, self._step - 1]
        steps = np.where(np.isfinite(steps), steps, 0.0)
        self._told = steps / (float(np.sqrt(np.mean(np.square(steps)))) or 1.0)
        self._tuned_at = 0

    def fit(self, centre: Assignment) -> None:
        """Fits, and finds whether the rows speak for the table."""
        super().fit(centre)
        self.trusted = len(self._choice[0]) > len(self._parts)

    def _hypotheses(self) -> Sequence[Sequence[float]]:
        if not self._told.any():
            return SHARES
        return [*SHARES, *((*(generic * s for s in SHARES[1]), whole, own) for generic, whole, own in BLENDS)]

    def _expand(self, shares: Sequence[float], decay: float) -> tuple[Array, Array]:
        generic, informed = shares[: len(self._parts)], shares[len(self._parts) :]
        if not informed:
            return super()._expand(generic, decay)
        scale = decay ** (self._step - self._step.min())
        told = self._features * self._told
        parts = [np.sqrt(informed[0]) * told.sum(axis=1, keepdims=True)]
        if informed[1]:
            parts.append(np.sqrt(informed[1]) * told)
        if any(generic):
            parts.append(super()._expand(generic, decay)[1] / np.sqrt(np.mean(np.square(scale))))
        return scale, np.concatenate(parts, axis=1)

    def _steps(self, shares: Sequence[float], scale: Array, weights: Array) -> Array:
        generic, informed = shares[: len(self._parts)], shares[len(self._parts) :]
        if not informed:
            return super()._steps(generic, scale, weights)
        steps = np.sqrt(informed[0]) * weights[0] * self._told
        offset = 1
        if informed[1]:
            offset += len(self._told)
            steps += np.sqrt(informed[1]) * weights[1:offset] * self._told
        if any(generic):
            steps += super()._steps(generic, scale, weights[offset:]) / np.sqrt(np.mean(np.square(scale)))
        return np.asarray(steps)


def expected(forecast: Forecast, model: InformedModel, centre: Assignment) -> list[list[float]]:
    """Loss of every unit's levels, seen from an assignment: what was measured, with the forecast as its prior."""
    table = forecast.table(centre) if len(forecast) else None
    if table is not None:
        model.inform(table)
    if len(model):
        model.fit(centre)
        return model.effects()
    assert table is not None
    return effects_of(model.space, table)
