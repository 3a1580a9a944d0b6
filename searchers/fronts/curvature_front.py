"""One backward pass for a whole range of budgets: the additive model swept, measured and corrected along its front."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from evo_hpo.search.budget import Allowance
from evo_hpo.search.searcher import Searcher
from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.search.trial import Probe
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.curvature_region import CurvatureRegion, expected
from searchers.additive.forecast import Forecast
from searchers.additive.informed import InformedModel
from searchers.additive.model import Effects
from searchers.additive.sweep import sweep
from searchers.fronts.interleaved import Interleaved
from searchers.wrapping import passes_on

__all__ = ["CurvatureFront"]

PASS_SHARE = 0.25  # of the budget, that the one pass at the uncompressed model may cost


@passes_on(CurvatureRegion)
class CurvatureFront(Interleaved):
    """The curvature at the uncompressed model, read once, gives an additive model of every budget at once.

    At several budgets a ``curvature_region`` then measures and corrects the model's assignment. All of them share one
    forecast and one model: a slope that is read or a difference that is measured at one budget informs the others, the
    nearer the more. Between two of these budgets the front takes units from one assignment to the next, in the exact
    order that the model gives.

    Args:
        budgets: at which assignments are measured: how many, evenly spaced over the range, both ends among them.
        settings: those of ``curvature_region``.
    """

    asks_for_sensitivities = True

    def __init__(self, space: CompressionSpace, *, seed: int = 0, budgets: int = 5, **settings: Any) -> None:
        super().__init__(space, seed=seed, budgets=budgets)
        self._settings = settings
        self.forecast, self.model = Forecast(space), InformedModel(space)
        self._first: CurvatureRegion | None = None  # of the searches, until the pass for all is paid
        assert self.inner

    def make(self, space: CompressionSpace) -> Searcher:
        region = CurvatureRegion(space, seed=int(self.rng.integers(2**31)), **self._settings)
        region.forecast, region.model = self.forecast, self.model
        if region.prior:
            self._first = region
        return region

    def next_probe(self, allowance: Allowance) -> Probe | None:
        """First the one pass for all, then what the searches ask for."""
        if self._first is not None:
            self._first.allowance = allowance
            if tokens := self._first.pass_tokens(PASS_SHARE):
                return Probe(None, "sampled", tokens)
            self._first = None
        return super().next_probe(allowance)

    def learn_sensitivities(self, found: Sensitivities) -> None:
        """The first pass belongs to all."""
        if self._first is None:
            super().learn_sensitivities(found)
            return
        self._first = None
        self.forecast.add(found)

    def front(self) -> list[Assignment]:
        """The measured assignments and what the model puts between them."""
        measured = self.recommended()
        if not (len(self.forecast) or len(self.model)):
            return measured
        model = copy.copy(self.model)  # to look at the front changes no search
        between = (self._between(model, a, b) for a, b in itertools.pairwise(measured))
        return list(itertools.chain(measured, *between))

    def _between(self, model: InformedModel, lower: Assignment, higher: Assignment) -> Iterator[Assignment]:
        """The front of the model between two assignments, with the levels between theirs."""
        space, low, high = self.space, self.space.cost(lower), self.space.cost(higher)
        if low >= high:
            return
        effects: Effects = [
            [loss if min(a, b) <= k <= max(a, b) else float("inf") for k, loss in enumerate(unit)]
            for unit, a, b in zip(expected(self.forecast, model, lower), lower, higher, strict=True)
        ]
        within = CompressionSpace(
            space.units, (high, *space.budgets[1:]), floor=(low, *space.floors[1:]), resources=space.resources
        )
        for levels in sweep(within, effects):
            if low < space.cost(levels) < high:
                yield levels
