"""One backward pass for a whole range of budgets: the additive model swept, measured and corrected along its front."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from evo_hpo.search.budget import Allowance
from evo_hpo.search.searcher import Searcher, one_of, passes_on
from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.search.trial import Probe
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.curvature_region import CurvatureRegion
from searchers.additive.forecast import Forecast
from searchers.additive.informed import InformedModel, expected
from searchers.additive.model import Effects
from searchers.additive.sweep import sweep
from searchers.fronts.interleaved import Interleaved

PASS_SHARE = 0.25  # of the budget, that the one pass at the uncompressed model may cost
LEAST = 1e-6  # of the greatest modelled loss, that all of the cost counts as where the model tells levels not apart


@passes_on(CurvatureRegion)
class CurvatureFront(Interleaved):
    """The curvature at the uncompressed model, read once, gives an additive model of every budget at once.

    At several budgets a ``curvature_region`` then measures and corrects the model's assignment. Between two of these
    budgets the front takes units from one assignment to the next, in the exact order that the model gives.

    Args:
        budgets: at which assignments are measured: how many, evenly spaced over the range, both ends among them.
        share: ``pass``: only the curvature is common to all budgets; ``all``: slopes and measured differences too, the
            nearer the more. Where losses differ by orders of magnitude over the range, those at its foot mislead.
        settings: those of ``curvature_region``.
    """

    asks_for_sensitivities = True

    def __init__(
        self, space: CompressionSpace, *, seed: int = 0, budgets: int = 5, share: str = "pass", **settings: Any
    ) -> None:
        super().__init__(space, seed=seed, budgets=budgets)
        self._settings = settings
        self.asks_for_sensitivities = bool(settings.get("prior", True))
        self._all = one_of("share", share, "pass", "all") == "all"
        self._common = Forecast(space), InformedModel(space)
        self.regions: list[CurvatureRegion] = []
        self._first: CurvatureRegion | None = None  # of the searches, until the pass for all is paid
        _ = self.inner  # made now: it is their settings that say whether there is a first pass

    def make(self, space: CompressionSpace) -> Searcher:
        region = CurvatureRegion(space, seed=int(self.rng.integers(2**31)), **self._settings)
        if self._all:
            region.forecast, region.model = self._common
        self.regions.append(region)
        if region.prior:
            self._first = region
        return region

    def next_probe(self, allowance: Allowance) -> Probe | None:
        """First the one pass for all, then what the searches ask for."""
        if self._first is not None:
            self._first.allowance = allowance
            if tokens := self._first.pass_tokens(PASS_SHARE, self._first.first_tokens):
                return Probe(None, "sampled", tokens)
            self._first = None
        return super().next_probe(allowance)

    def learn_sensitivities(self, found: Sensitivities) -> None:
        """The first pass belongs to all."""
        if self._first is None:
            super().learn_sensitivities(found)
            return
        self._first = None
        for forecast in {id(region.forecast): region.forecast for region in self.regions}.values():
            forecast.add(found)

    def front(self) -> list[Assignment]:
        """The measured assignments and what the model of the dearer one puts between each two."""
        ordered = sorted(self.regions, key=lambda region: self.space.cost(_measured(region)))
        between = (self._between(_measured(a), b) for a, b in itertools.pairwise(ordered))
        return list(itertools.chain(self.recommended(), *between))

    def _between(self, lower: Assignment, region: CurvatureRegion) -> Iterator[Assignment]:
        """The front of a region's model between a cheaper assignment and its own, with the levels between theirs.

        What is learnt at an assignment holds for less compression rather than for more, and tells least where the
        model is broken; so the dearer of two regions is asked. No level counts as better than one of the same unit that
        costs more, whatever noise says, and of two that lose the same the costlier one is better: so there is an
        assignment for every budget between the two.
        """
        higher = _measured(region)
        space, low, high = self.space, self.space.cost(lower), self.space.cost(higher)
        if low >= high or not (len(region.forecast) or len(region.model)):
            return
        model = copy.copy(region.model)  # to look at the front changes no search
        told = expected(region.forecast, model, higher)
        least = max(1.0, max(float(np.abs(unit).max()) for unit in told)) * LEAST / high
        effects: Effects = [
            [loss if min(a, b) <= k <= max(a, b) else float("inf") for k, loss in enumerate(unit)]
            for unit, a, b in zip(no_worse(told, space, least), lower, higher, strict=True)
        ]
        within = CompressionSpace(
            space.units, (high, *space.budgets[1:]), floor=(low, *space.floors[1:]), resources=space.resources
        )
        for levels in sweep(within, effects):
            if low < space.cost(levels) < high:
                yield levels


def _measured(region: CurvatureRegion) -> Assignment:
    """Where a region is, or was before it moved on slopes alone."""
    return region.recommend() or region.incumbent


def no_worse(told: Effects, space: CompressionSpace, least: float) -> Effects:
    """Losses (units x levels, nats a token), none below that of a level of the unit that costs more.

    Where they are alike, the costlier level has ``least`` less for each unit of cost.
    """
    found = []
    for losses, costs in zip(told, space.knapsack.first_costs, strict=True):
        kept = list(losses)
        for dearer, k in itertools.pairwise(sorted(range(len(costs)), key=lambda k: -costs[k])):
            kept[k] = max(kept[k], kept[dearer])
        found.append([loss - least * cost for loss, cost in zip(kept, costs, strict=True)])
    return found
