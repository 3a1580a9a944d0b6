"""One backward pass for a whole range of budgets: the additive model swept, measured and corrected along its front."""

from __future__ import annotations

import itertools
from typing import Any

from evo_hpo.search.budget import Allowance
from evo_hpo.search.searcher import Searcher
from evo_hpo.search.sensitivities import READS, Sensitivities
from evo_hpo.search.trial import Probe
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.curvature_region import FIRST_PASS, CurvatureRegion
from searchers.additive.forecast import Forecast
from searchers.additive.informed import InformedModel
from searchers.additive.one_shot import effects_of
from searchers.additive.sweep import sweep
from searchers.interleaved import Interleaved

__all__ = ["CurvatureFront"]

PASS_SHARE = 0.25  # of the budget, that the first pass may cost


class CurvatureFront(Interleaved):
    """The curvature at the uncompressed model, read once, gives the exact front of the first additive model.

    At several budgets along it a ``curvature_region`` then measures and corrects its own assignment. All of them share
    one forecast and one model: a slope that is read, or a difference that is measured, at one budget informs the
    others, the nearer the more. Between two of these budgets the front takes units from the lower assignment to the
    higher one, in the exact order that the model gives; below the lowest it takes units down.

    Args:
        budgets: where assignments are measured: how many, evenly spaced over the range, both ends among them.
        settings: those of ``curvature_region``.
    """

    asks_for_sensitivities = True

    def __init__(self, space: CompressionSpace, *, seed: int = 0, budgets: int = 5, **settings: Any) -> None:
        super().__init__(space, seed=seed, budgets=budgets)
        self._settings = settings
        self.forecast, self.model = Forecast(space), InformedModel(space)
        self._first: bool = True
        self._regions: list[CurvatureRegion] = []
        if not self.inner:
            raise AssertionError

    def make(self, space: CompressionSpace) -> Searcher:
        region = CurvatureRegion(space, seed=int(self.rng.integers(2**31)), **self._settings)
        region.forecast, region.model = self.forecast, self.model
        self._regions.append(region)
        return region
