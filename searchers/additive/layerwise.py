"""Dynamic programming over layer-wise errors, with SPDY's search for their weights.

SPDY (Frantar and Alistarh, arXiv 2201.13096) gives each layer's errors a coefficient, solves the knapsack for the sum
exactly, and finds the coefficients by random search on the measured loss: first drawn at random, then by redrawing
ever fewer of the best ones. The EvoPress paper compares with it. The errors are those of the level store: squared error
of the layer's own output, relative to that output, on the store's calibration text. They cost no tokens here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from evo_hpo.search.procedure import OneFidelity, Steps
from evo_hpo.search.searcher import boolean
from evo_hpo.search.trial import Probe
from evo_hpo.space.compression_space import CompressionSpace
from searchers.additive.one_shot import effects_of
from searchers.additive.solvers import solve, solve_many

Array = np.ndarray[Any, np.dtype[np.float64]]

FIRST = 100  # draws of all coefficients, and draws of each neighbourhood's size
LARGEST = 0.1  # share of the coefficients that the first neighbourhood redraws


class Layerwise(OneFidelity):
    """Solves the knapsack of the layer-wise errors exactly, then looks for weights of the layers that measure better.

    The plain errors come first. Of the trials that are left up to 100, and at most a third, draw all coefficients; the
    others redraw a tenth of the best ones, then fewer, down to one.

    Args:
        search: False: the plain errors' solution alone, one trial.
        settings: ``batch``, ``tokens``, ``minibatch``, see :class:`evo_hpo.search.procedure.OneFidelity`.
    """

    asks_for_sensitivities = True

    def __init__(self, space: CompressionSpace, *, seed: int = 0, search: bool = True, **settings: Any) -> None:
        super().__init__(space, seed=seed, **settings)
        self.search = boolean("search", search)
        self._errors: list[Array] = []
        self._weights: Array = np.ones(len(space))

    def steps(self) -> Steps[None]:
        """Errors, their solution, coefficients."""
        found = yield from self.sensitivities(Probe(None, "layerwise"))
        errors = effects_of(self.space, found.effects())
        self._errors = [np.array(row) for row in errors]
        self.incumbent = solve(self.space, errors) or self.space.uniform()
        yield from self.measure([self.incumbent])
        self.stop_reason = "the solution of the layer-wise errors is measured"
        if not self.search:
            return
        sizes = range(max(1, round(LARGEST * len(self.space))), 0, -1)
        left = self.trials_left(FIRST * (1 + len(sizes)))
        first = min(FIRST, max(1, left // 3))
        yield from self._draws(len(self.space), first)
        shares = np.diff(np.linspace(0, left - first, len(sizes) + 1).round().astype(int))
        for size, share in zip(sizes, shares.tolist(), strict=True):
            yield from self._draws(size, min(FIRST, share))
        self.stop_reason = "all neighbourhoods of the coefficients are searched"

    def _draws(self, size: int, count: int) -> Steps[None]:
        """So many times: redraw so many coefficients, solve, measure, keep what is better."""
        assert self.incumbent is not None
        for begun in range(0, count, self.batch):
            drawn = [self._redrawn(size) for _ in range(min(self.batch, count - begun))]
            found = solve_many(self.space, [self._weighted(weights) for weights in drawn])
            candidates = {a: w for a, w in zip(found, drawn, strict=True) if a is not None}
            self.incumbent, _, better = yield from self.improve(list(candidates), self.incumbent)
            if better:
                self._weights = candidates[self.incumbent]

    def _redrawn(self, size: int) -> Array:
        weights = self._weights.copy()
        weights[self.rng.permutation(len(weights))[:size]] = self.rng.random(size)
        return weights

    def _weighted(self, weights: Array) -> list[list[float]]:
        return [
            np.where(np.isfinite(row), w * row, np.inf).tolist() for w, row in zip(weights, self._errors, strict=True)
        ]
