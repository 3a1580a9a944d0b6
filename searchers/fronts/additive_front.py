"""An additive model of single-unit probes, swept exactly over a range of budgets, measured and corrected along it."""

from __future__ import annotations

import math
from typing import Any

from evo_hpo.search.procedure import OneFidelity, Steps
from evo_hpo.search.searcher import positive
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from evo_hpo.space.ranges import at, marks, uniform_at
from searchers.additive.model import AdditiveModel, Effects, within_reach
from searchers.additive.probing import PROBE_SHARE
from searchers.additive.solvers import solve
from searchers.additive.sweep import sweep


class AdditiveFront(OneFidelity):
    """Probes every level of every unit once, solves all budgets in one pass, and measures the solutions.

    Where every level was probed, the first front is that of the probed losses: exact where the loss is additive. What
    is measured along it are rows of one additive model; at each mark of the range in turn, the model that is fitted to
    the rows nearest to its best assignment proposes another one within a region around it.

    Args:
        changes: the most units that a correction may change; None: a tenth of the units, at least 4.
        settings: ``batch``, ``tokens``, ``minibatch``, see :class:`evo_hpo.search.procedure.OneFidelity`.
    """

    def __init__(self, space: CompressionSpace, *, seed: int = 0, changes: int | None = None, **settings: Any) -> None:
        super().__init__(space, seed=seed, **settings)
        self.changes = max(4, len(space) // 10) if changes is None else positive("changes", changes)
        self.model = AdditiveModel(space)
        self._losses: dict[Assignment, float] = {}
        self._effects: list[list[float]] = [[math.inf] * len(u.costs) for u in space.units]

    def steps(self) -> Steps[None]:
        centre = self._centre()
        _, self._losses[centre] = yield from self.measure([], centre)
        yield from self._probe(centre)
        budgets = [at(self.space, mark) for mark in marks(self.space)]
        yield from self._take(self._first_front(centre, budgets), centre)
        idle = 0
        while idle < len(budgets):
            for budget in budgets:
                best = self._least(budget)
                if best is None or not len(self.model):
                    idle += 1
                    continue
                self.model.fit(best)
                effects = within_reach(self.model.effects(), best, 1)
                levels = solve(budget, effects, start=best, changes=self.changes)
                idle = idle + 1 if levels is None or levels in self._losses else 0
                if levels is not None and levels not in self._losses:
                    yield from self._take([levels], best)
        self.stop_reason = "what the model proposes at every budget is measured"

    def _centre(self) -> Assignment:
        """Uniform compression in the middle of the range."""
        found = uniform_at(self.space) or [self.space.uniform()]
        return found[len(found) // 2]

    def _probe(self, centre: Assignment) -> Steps[None]:
        """Every level of every unit, in random order, as far as its share of the budget goes."""
        for unit, level in enumerate(centre):
            self._effects[unit][level] = 0.0
        free = self.space.knapsack.free
        pairs = [(u, k) for u in free for k in range(self.space.lowest[u], self.space.highest[u] + 1) if k != centre[u]]
        pairs = [pairs[i] for i in self.rng.permutation(len(pairs))]
        pairs = pairs[: max(1, int(PROBE_SHARE * self.trials_left(4 * len(pairs))))]
        alone = {pair: levels for pair in pairs if (levels := self._changed(centre, pair)) is not None}
        yield from self._take(list(alone.values()), centre)
        for (u, k), levels in alone.items():
            self._effects[u][k] = self._losses.get(levels, math.inf) - self._losses[centre]
        paid = {p: q for p in pairs if p not in alone for q in self._payers(centre, p, list(alone))[:1]}
        made = {p: levels for p, q in paid.items() if (levels := self._changed(centre, p, q)) is not None}
        yield from self._take(list(made.values()), centre)
        for (u, k), levels in made.items():
            other, level = paid[u, k]
            self._effects[u][k] = (
                self._losses.get(levels, math.inf) - self._losses[centre] - self._effects[other][level]
            )

    def _changed(self, centre: Assignment, *pairs: tuple[int, int]) -> Assignment | None:
        """The centre with some units at other levels, if that is feasible."""
        levels = list(centre)
        for unit, level in pairs:
            levels[unit] = level
        return tuple(levels) if self.space.feasible(levels) else None

    def _payers(self, centre: Assignment, pair: tuple[int, int], known: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Changes of another unit, probed already, that make this one feasible."""
        return [q for q in known if q[0] != pair[0] and self._changed(centre, pair, q) is not None]

    def _first_front(self, centre: Assignment, budgets: list[CompressionSpace]) -> list[Assignment]:
        """At each mark the dearest of the model's whole front that fits."""
        effects: Effects = self._effects
        if not all(
            math.isfinite(self._effects[u][k])
            for u in range(len(self.space))
            for k in range(self.space.lowest[u], self.space.highest[u] + 1)
        ):
            if not len(self.model):
                return []
            self.model.fit(centre)
            effects = within_reach(self.model.effects(), centre, 1)
        front = sweep(self.space, effects)
        fitting = ([a for a in front if budget.feasible(a)] for budget in budgets)
        return list(dict.fromkeys(found[-1] for found in fitting if found))

    def _take(self, candidates: list[Assignment], reference: Assignment) -> Steps[None]:
        """Measures candidates; what they differ by from the reference are rows of the model."""
        losses, base = yield from self.measure(candidates, reference)
        for levels, loss in zip(candidates, losses, strict=True):
            self._losses[levels] = loss
            self.model.add(levels, reference, loss - base)

    def _least(self, budget: CompressionSpace) -> Assignment | None:
        """The least loss that fits a budget."""
        fitting = [a for a, loss in self._losses.items() if math.isfinite(loss) and budget.feasible(a)]
        return min(fitting, key=self._losses.__getitem__, default=None)
