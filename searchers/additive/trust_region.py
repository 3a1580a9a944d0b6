"""The additive model within a trust region: our strongest opponent of EvoPress."""

from __future__ import annotations

import math
from typing import Any

from evo_hpo.search.procedure import OneFidelity, Steps
from evo_hpo.search.searcher import positive, probability
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.model import AdditiveModel, within_reach
from searchers.additive.solvers import solve_many
from searchers.moves import Moves

PROBE_SHARE = 0.15
LARGEST = 4  # a region never holds more than one in this many units
SUCCESS, FAILURE = 0.5, 0.1  # measured over predicted gain above which the region grows, below which it shrinks
GROWTH, SHRINKAGE = 1.6, 0.6


class TrustRegion(OneFidelity):
    """Measure, fit an additive model, solve it exactly within r changed units, measure what it says, adapt r, repeat.

    The optimum of an additive model is often worse than uniform on a real model, as effects of many changes do not add
    up; cautious steps are not. Each batch holds the exact solutions for the model's mean within r/2, r and 2r changed
    units, and for draws from its posterior within r (Thompson sampling), all measured beside the incumbent on the same
    minibatch; the best moves in if it is better, and every measurement teaches the model. The region grows where the
    measured gain is at least half of the predicted one, and shrinks where it is below a tenth.

    Args:
        radius: changed units of the first region; None: a twentieth of the units, at least 4.
        probes: random exchanges measured first; None: one a unit, but at most 15 % of the budget.
        reach: levels that a unit may move within one region; None: any number.
        explore: share of a batch that are posterior draws.
        memory: measurements that the model is fitted to, the nearest ones.
        batch: trials a batch, the incumbent not counted.
        minibatch: ``fixed``; ``fresh`` for each batch (the incumbent is scored again in it); ``auto``: fresh where the
            problem reads tokens.
    """

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        radius: int | None = None,
        probes: int | None = None,
        reach: int | None = 1,
        explore: float = 0.6,
        memory: int = 600,
        minibatch: str = "auto",
        **settings: Any,
    ) -> None:
        super().__init__(space, seed=seed, minibatch="fixed" if minibatch == "auto" else minibatch, **settings)
        self._auto = minibatch == "auto"
        self.first_radius = max(4, len(space) // 20) if radius is None else positive("radius", radius)
        self.largest_radius = max(self.first_radius, len(space) // LARGEST)
        self.probes = probes if probes is None else positive("probes", probes)
        self.reach = reach if reach is None else positive("reach", reach)
        self.explore = probability("explore", explore)
        self.model = AdditiveModel(space, memory=positive("memory", memory, 8))
        self.moves = Moves(space)

    def steps(self) -> Steps[None]:
        if self._auto:
            self.minibatch = "fresh" if self.allowance.default_tokens else "fixed"
        self.incumbent = self.space.uniform()
        probes = self.probes or max(4, min(len(self.space), int(PROBE_SHARE * self.trials_left(10 * len(self.space)))))
        for first in range(0, probes, self.batch):
            yield from self._learn(self._exchanges(min(self.batch, probes - first), set()))
        radius = float(self.first_radius)
        while True:
            ratio = yield from self._region(max(1, round(radius)))
            if ratio is None:
                self.stop_reason = "no assignment that is new around the incumbent"
                return
            if ratio >= SUCCESS:
                radius = min(radius * GROWTH, float(self.largest_radius))
            elif ratio < FAILURE:
                radius = radius * SHRINKAGE if radius > 2 else float(self.first_radius)

    def _region(self, radius: int) -> Steps[float | None]:
        """One batch; the gain that it measured, over the gain that the model had predicted for its best."""
        assert self.incumbent is not None
        centre = self.incumbent
        known = set(self._known) | {centre}
        candidates: dict[Assignment, None] = {}
        effects: list[list[float]] = []
        if len(self.model):
            self.model.fit(centre)
            effects = within_reach(self.model.effects(), centre, self.reach)
            draws = [
                within_reach(self.model.effects(self.rng), centre, self.reach)
                for _ in range(round(self.explore * self.batch))
            ]
            proposals = solve_many(self.space, [effects, *draws], start=centre, changes=radius)
            for other in {max(2, radius // 2), min(2 * radius, self.largest_radius)} - {radius}:
                proposals[1:1] = solve_many(self.space, [effects], start=centre, changes=other)
            candidates = {a: None for a in proposals if a is not None and a not in known}
        chosen = list(candidates)[: self.batch]
        chosen += self._exchanges(self.batch - len(chosen), known | set(chosen))
        if not chosen:
            return None
        predicted = max((self._predict(effects, centre, a) for a in chosen), default=0.0) if effects else 0.0
        gain = yield from self._learn(chosen)
        return gain / predicted if predicted > 0 else float(gain > 0)

    def _learn(self, candidates: list[Assignment]) -> Steps[float]:
        """Measures candidates beside the incumbent, adds the rows, moves to the best; its gain."""
        assert self.incumbent is not None
        centre = self.incumbent
        losses, reference = yield from self.measure(candidates, centre)
        for levels, loss in zip(candidates, losses, strict=True):
            self.model.add(levels, centre, loss - reference)
        best = min(range(len(losses)), key=losses.__getitem__, default=None)
        if best is None or not losses[best] < reference:
            return 0.0
        self.incumbent = candidates[best]
        return reference - losses[best] if math.isfinite(reference) else 0.0

    def _exchanges(self, count: int, known: set[Assignment]) -> list[Assignment]:
        """Up to ``count`` new random exchanges from the incumbent."""
        assert self.incumbent is not None
        found: dict[Assignment, None] = {}
        for attempt in range(20 * count):
            if len(found) == count:
                break
            drawn = self.moves.walk(self.incumbent, 1 + attempt // (4 * count), self.rng)
            if drawn != self.incumbent and drawn not in known:
                found[drawn] = None
        return list(found)

    def _predict(self, effects: list[list[float]], centre: Assignment, levels: Assignment) -> float:
        """Gain that the effects promise; random exchanges beyond the reach count as infinitely bad."""
        return sum(e[a] - e[b] for e, a, b in zip(effects, centre, levels, strict=True))
