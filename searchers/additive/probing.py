"""Single-unit probes with feasible assignments, and searchers that solve the additive model that they give."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from evo_hpo.search.procedure import OneFidelity, Steps
from evo_hpo.search.searcher import boolean, positive
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.model import AdditiveModel, Effects, within_reach
from searchers.moves import Moves

PROBE_SHARE = 0.6  # of the budget, at most, for the probes that come first


class Probing(OneFidelity):
    """Probe every unit, fit the additive model, solve it, measure the solution, learn from it; again until it repeats.

    A unit is probed down by lowering it (which is always within the budget; where the floor forbids it, other units
    are raised in turn), and up by raising it, paid by lowering the units whose measured harm for the cost they free is
    least. Solutions that disappoint are rows for the next fit; when nothing new is proposed, the units are probed
    again around the incumbent if it has moved, else the search ends.

    Args:
        probe_levels: how many levels up and down each unit is probed, and may be moved by one solution; None: as many
            as 60 % of the budget pays. A budget that does not even pay for one level probes random units.
        changes: the most units that a solution may change; None: any number (the plain optimum of the model).
        refine: False: one round of probes and one solution, as published methods do (SPDY, arXiv 2201.13096).
        settings: ``batch``, ``tokens``, ``minibatch``, see :class:`evo_hpo.search.procedure.OneFidelity`.
    """

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        probe_levels: int | None = None,
        changes: int | None = None,
        refine: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(space, seed=seed, **settings)
        self.probe_levels = probe_levels if probe_levels is None else positive("probe_levels", probe_levels)
        self.changes = changes if changes is None else positive("changes", changes)
        self.refine = boolean("refine", refine)
        self.model = AdditiveModel(space)
        self.moves = Moves(space)

    @abstractmethod
    def solve(self, effects: Effects, start: Assignment) -> Assignment | None:
        """The best feasible assignment for the effects."""

    def steps(self) -> Steps[None]:
        self.incumbent = self.space.uniform()
        yield from self.measure([], self.incumbent)
        tried: set[Assignment] = set()
        probed_at: Assignment | None = None
        while True:
            moved = probed_at != self.incumbent
            if moved and (probed_at is None or self.refine or not len(self.model)):
                probed_at = self.incumbent
                yield from self._probe(probed_at)
            if not len(self.model) and probed_at != self.incumbent:
                continue  # the start failed and taught nothing, but a probe did not
            if not len(self.model):
                self.stop_reason = "no probe is feasible and succeeds"
                return
            self.model.fit(self.incumbent)
            found = self.solve(within_reach(self.model.effects(), self.incumbent, self._reached), self.incumbent)
            if found is None or found in tried or found == self.incumbent:
                if probed_at != self.incumbent and self.refine:
                    continue
                self.stop_reason = "the model's optimum is measured already"
                return
            tried.add(found)
            yield from self._rows([found], self.incumbent)
            if not self.refine:
                self.stop_reason = "the model's optimum is measured"
                return

    def _reach(self) -> int:
        if self.probe_levels is not None:
            return min(self.probe_levels, max(len(u.costs) for u in self.space.units) - 1)
        allowed = PROBE_SHARE * self.trials_left(4 * len(self.space)) / max(1, 2 * len(self.moves.free))
        return max(1, min(int(allowed), max(len(u.costs) for u in self.space.units) - 1))

    def _probe(self, centre: Assignment) -> Steps[None]:
        """Every unit down and up, in random order; the incumbent may move to a probe that is better."""
        self._reached = reach = self._reach()
        pairs = [(u, step) for u in self.moves.free for step in range(1, reach + 1)]
        pairs = [pairs[i] for i in self.rng.permutation(len(pairs))]
        affordable = int(PROBE_SHARE * self.trials_left(4 * len(pairs)))
        limit = max(2, affordable // 2)
        harm: dict[int, float] = {}
        downs = [(u, self._down(centre, u, step)) for u, step in pairs[:limit]]
        losses, reference = yield from self._rows([a for _, a in downs if a is not None], centre)
        for (u, levels), loss in zip([d for d in downs if d[1] is not None], losses, strict=True):
            assert levels is not None
            freed = max(1, self.space.cost(centre) - self.space.cost(levels))
            harm[u] = min(harm.get(u, math.inf), (loss - reference) / freed)
        payers = sorted(harm, key=lambda u: (harm[u], u))
        ups = [a for u, step in pairs[:limit] if (a := self._up(centre, u, step, payers)) is not None]
        yield from self._rows(ups, centre)

    def _rows(self, candidates: list[Assignment], centre: Assignment) -> Steps[tuple[list[float], float]]:
        """Measures candidates beside the centre, adds the rows to the model, and moves to the best if it is better."""
        losses, reference = yield from self.measure(candidates, centre)
        for levels, loss in zip(candidates, losses, strict=True):
            self.model.add(levels, centre, loss - reference)
        if losses and min(losses) < reference:
            self.incumbent = candidates[min(range(len(losses)), key=losses.__getitem__)]
        return losses, reference

    def _down(self, centre: Assignment, unit: int, step: int) -> Assignment | None:
        if centre[unit] - step < self.space.lowest[unit]:
            return None
        cursor = self.space.knapsack.cursor(centre)
        cursor.step(unit, -step)
        for peer in self.rng.permutation(self.moves.free).tolist():
            if cursor.feasible:
                break
            if peer != unit and cursor.fits(peer):
                cursor.step(peer)
        return cursor.assignment()

    def _up(self, centre: Assignment, unit: int, step: int, payers: list[int]) -> Assignment | None:
        if centre[unit] + step > self.space.highest[unit]:
            return None
        cursor = self.space.knapsack.cursor(centre)
        cursor.step(unit, step)
        others = self.rng.permutation(self.moves.free).tolist()
        for _ in range(step):
            cursor.pay([u for u in [*payers, *others] if u != unit])
        levels = cursor.assignment() or self.space.repair(cursor.levels)
        return levels if levels[unit] > centre[unit] else None
