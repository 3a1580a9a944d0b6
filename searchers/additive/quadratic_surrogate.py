"""A quadratic fitted to measured losses, then minimised.

MAP (Li et al., "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation", arXiv
2406.07529) evaluates a few random settings of continuous coefficients, fits a quadratic to the results, and optimises
that instead of the model. Here a unit's coordinate is the root of a quantization error that quarters with each level
(2^-level), and the space is under a budget. With far fewer measurements than coefficients the fit is a Bayesian ridge:
linear terms, squares and products have one prior variance each, chosen with the noise by the marginal likelihood.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from evo_hpo.search.procedure import OneFidelity, Steps
from evo_hpo.search.searcher import boolean, positive, probability
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.quadratic import Quadratic, minimise
from searchers.moves import Moves

Array = np.ndarray[Any, np.dtype[np.float64]]

SCALES = (0.0, 0.1, 1.0, 10.0)  # prior variance of squares and of products, over that of linear terms
NOISES = (1e-8, 1e-3, 1e-2, 0.1, 1.0)  # over the mean of the kernel's diagonal
OUTLIER = 20.0  # differences above this multiple of their median are cut to it: a ruined model teaches little


class QuadraticSurrogate(OneFidelity):
    """Measures random assignments around uniform, fits a quadratic, measures its minimum, and fits again.

    Args:
        share: of the budget that the random assignments may take.
        radius: exchanges that a random assignment is away from uniform, at most, and half of the units that a minimum
            may change; None: an eighth of the units, at least 2.
        refine: False: one fit and one minimum, as published.
        memory: measurements that are fitted, the last ones.
        settings: ``batch``, ``tokens``, ``minibatch``, see :class:`evo_hpo.search.procedure.OneFidelity`.
    """

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        share: float = 0.6,
        radius: int | None = None,
        refine: bool = True,
        memory: int = 400,
        **settings: Any,
    ) -> None:
        super().__init__(space, seed=seed, **settings)
        self.share, self.refine = probability("share", share), boolean("refine", refine)
        self.radius = max(2, len(space) // 8) if radius is None else positive("radius", radius)
        self.memory = positive("memory", memory, 8)
        self.moves = Moves(space)
        depth = max(len(unit.costs) for unit in space.units)
        self._coordinates = np.tile(2.0 ** -np.arange(depth), (len(space), 1))
        self._coordinates -= self._coordinates[np.arange(len(space)), list(space.uniform())][:, None]
        self._forbidden = [[not 0 <= k < len(u.costs) for k in range(depth)] for u in space.units]
        self._rows: dict[Assignment, float] = {}
        self._scales, self._tuned_at = (1.0, 0.1, 1e-2), 0

    def steps(self) -> Steps[None]:
        """Sample, then fit and minimise until nothing new is proposed."""
        self.incumbent = uniform = self.space.uniform()
        samples = max(4, int(self.share * self.trials_left(4 * len(self.space))))
        for first in range(0, samples, self.batch):
            yield from self._learn(self._drawn(uniform, min(self.batch, samples - first)), uniform)
        while len(self._rows) > 2:
            model = self._fit()
            found = [self._minimum(model, changes) for changes in (2 * self.radius, self.radius, 4 * self.radius)]
            new = [a for a in dict.fromkeys(found[: 1 + 2 * self.refine]) if a not in self._rows and a != uniform]
            if not new:
                self.stop_reason = "the quadratic's minimum is measured already"
                return
            if self.refine:
                new += [a for a in self._drawn(self.incumbent, self.batch - len(new)) if a not in new]
            yield from self._learn(new, uniform)
            if not self.refine:
                self.stop_reason = "the quadratic's minimum is measured"
                return
        self.stop_reason = "too few assignments were measured"

    def _drawn(self, around: Assignment, count: int) -> list[Assignment]:
        """New random assignments, one to ``radius`` exchanges away."""
        drawn = [self.moves.walk(around, 1 + int(self.rng.integers(self.radius)), self.rng) for _ in range(count)]
        return [a for a in dict.fromkeys(drawn) if a not in self._rows and a != self.space.uniform()]

    def _learn(self, candidates: list[Assignment], uniform: Assignment) -> Steps[None]:
        """Measures candidates beside the uniform assignment and keeps the differences."""
        losses, reference = yield from self.measure(candidates, uniform)
        for levels, loss in zip(candidates, losses, strict=True):
            if np.isfinite(difference := loss - reference):
                self._rows[levels] = difference
        self.incumbent = min(self._rows, key=self._rows.__getitem__, default=uniform)
        if self._rows and self._rows[self.incumbent] >= 0:
            self.incumbent = uniform

    def _minimum(self, model: Quadratic, changes: int) -> Assignment:
        assert self.incumbent is not None
        return minimise(self.space, model, self.incumbent, self.rng, changes=changes, kicks=2)

    def _fit(self) -> Quadratic:
        """The posterior mean: the change of the loss from uniform."""
        levels = list(self._rows)[-self.memory :]
        values = np.array([self._rows[a] for a in levels])
        limit = OUTLIER * float(np.median(np.abs(values)))
        values = np.clip(values, -limit, limit) if limit else values
        units = np.arange(len(self.space))
        x = np.array([self._coordinates[units, list(a)] for a in levels])
        products = x @ x.T
        kernels = products, np.square(x) @ np.square(x).T, np.square(products)
        if len(levels) >= 2 * self._tuned_at:
            self._tuned_at = len(levels)
            self._scales = max(itertools.product(SCALES, SCALES, NOISES), key=lambda s: _evidence(kernels, values, s))
        squares, pairs, _ = self._scales
        alpha = cho_solve(_factor(kernels, self._scales), values)
        linear, square = x.T @ alpha, squares * (np.square(x).T @ alpha)
        effects = linear[:, None] * self._coordinates + square[:, None] * np.square(self._coordinates)
        effects = np.where(self._forbidden, np.inf, effects)
        return Quadratic(effects, x[:, :, None] * self._coordinates, 2 * pairs * alpha)


def _factor(kernels: tuple[Array, ...], scales: tuple[float, float, float]) -> tuple[Array, bool]:
    kernel = kernels[0] + scales[0] * kernels[1] + scales[1] * kernels[2]
    noise = scales[2] * float(np.trace(kernel)) / len(kernel) + 1e-12
    return cho_factor(kernel + noise * np.eye(len(kernel)), lower=True)


def _evidence(kernels: tuple[Array, ...], values: Array, scales: tuple[float, float, float]) -> float:
    """Log marginal likelihood, the overall scale at its best."""
    factor = _factor(kernels, scales)
    weighted = float(values @ cho_solve(factor, values))
    return -0.5 * len(values) * float(np.log(max(weighted, 1e-300))) - float(np.log(np.diag(factor[0])).sum())
