"""Curvature with cross terms between units, and a quadratic knapsack over it.

Schaefer et al., "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization"
(arXiv 2306.04879) add to each layer's sensitivity what layers do to each other; CLADO (Deng et al., arXiv 2307.05657)
measures every pair and solves an integer quadratic program. Here the cross terms come with the pass that gives the
diagonal: they are inner products of the sequences' projections. From few sequences most of them are noise, so they are
shrunk towards none, as much as their own variance asks (Schäfer and Strimmer, Statistical Applications in Genetics and
Molecular Biology 4, 2005).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from evo_hpo.search.procedure import Steps
from evo_hpo.search.searcher import probability
from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.search.trial import Probe
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.one_shot import OneShot, effects_of
from searchers.additive.quadratic import Quadratic, minimise
from searchers.additive.solvers import solve


class AugmentedHessian(OneShot):
    """Measures the Fisher information once, keeps its cross terms, and solves the quadratic knapsack by local search.

    Args:
        shrinkage: share of the cross terms that is taken away, 0 to 1; 1 is ``fisher``; None: as their noise asks.
        settings: ``share``, ``most_tokens``, see :class:`searchers.additive.one_shot.OneShot`.
    """

    def __init__(
        self, space: CompressionSpace, *, seed: int = 0, shrinkage: float | None = None, **settings: Any
    ) -> None:
        super().__init__(space, seed=seed, **settings)
        self.shrinkage = shrinkage if shrinkage is None else probability("shrinkage", shrinkage)

    def find(self, tokens: int) -> Steps[Assignment | None]:
        """One pass; from the exact solution without cross terms on."""
        found = yield from self.sensitivities(Probe(None, "sampled", tokens))
        start = solve(self.space, effects_of(self.space, found.effects()))
        if start is None:
            return None
        shrinkage = noise_of_pairs(found, start) if self.shrinkage is None else self.shrinkage
        return minimise(self.space, curvature_with_cross_terms(found, shrinkage), start, self.rng)


def curvature_with_cross_terms(found: Sensitivities, shrinkage: float) -> Quadratic:
    """The change of the loss from the uncompressed model; ``shrinkage`` 1: without cross terms."""
    factors = np.nan_to_num(found.factors())
    return Quadratic(shrinkage * found.effects(), factors, np.full(len(factors), 1.0 - shrinkage))


def noise_of_pairs(found: Sensitivities, at: Assignment) -> float:
    """Variance of the cross terms at an assignment, over their squares: the shrinkage of least expected error."""
    projections = found.projections.astype(np.float64)[:, np.arange(len(at)), list(at)]
    if len(projections) < 2:
        return 1.0
    count, own = len(projections), np.square(projections)
    means = projections.T @ projections / count
    np.fill_diagonal(means, 0.0)
    squares = float(np.square(means).sum())
    of_products = float(np.square(own.sum(axis=1)).sum() - np.square(own).sum()) / count  # mean over sequences, pairs
    variance = (of_products - squares) / (count - 1)
    return min(1.0, variance / squares) if squares else 1.0
