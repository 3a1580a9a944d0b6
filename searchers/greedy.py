"""Greedy search by measured marginal gain."""

from __future__ import annotations

import math
from typing import Any

from evo_hpo.search.procedure import OneFidelity, Steps
from evo_hpo.search.searcher import one_of, positive
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.moves import Moves


class Greedy(OneFidelity):
    """Lowers the unit of least measured harm for the cost it frees, raises that of most measured gain, and so on.

    All units are measured once; later only the ``lazy`` most promising are measured again before each step (gains
    change little, and mostly fall). An exchange that does not lower the loss is taken back and the next unit tried;
    when ``patience`` units failed, all are measured anew, and when that does not help the search ends.

    Args:
        start: ``uniform``: exchanges from uniform compression; ``cheapest``: first the classical greedy, which raises
            units from the cheapest assignment while the budget allows, then exchanges.
        lazy: units measured again before each step.
        patience: units lowered in vain before all are measured anew.
        settings: ``batch``, ``tokens``, ``minibatch``, see :class:`evo_hpo.search.procedure.OneFidelity`.
    """

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        start: str = "uniform",
        lazy: int = 8,
        patience: int = 4,
        **settings: Any,
    ) -> None:
        super().__init__(space, seed=seed, **settings)
        self.start = one_of("start", start, "uniform", "cheapest")
        self.lazy = positive("lazy", lazy)
        self.patience = positive("patience", patience)
        self.moves = Moves(space)
        self._rates: dict[tuple[int, int], float] = {}  # (unit, direction) -> last measured loss for its cost

    def steps(self) -> Steps[None]:
        self.incumbent = self.space.uniform()
        if self.start == "cheapest":
            cheapest = self.space.repair(self.space.lowest)
            raised = yield from self._raise(cheapest)
            self.incumbent, _, _ = yield from self.improve([raised], self.incumbent)
            self._rates.clear()
        while True:
            improved = yield from self._exchange()
            if not improved and self._rates:
                self._rates.clear()
                improved = yield from self._exchange()
            if not improved:
                self.stop_reason = "no measured exchange lowers the loss"
                return

    def _exchange(self) -> Steps[bool]:
        """Lowers a unit and spends what it frees; True when that lowered the loss and was kept."""
        assert self.incumbent is not None
        current = self.incumbent
        lowered = yield from self._measured(current, -1)
        if not lowered:
            return (yield from self._exchange_under_floor())
        for candidate in lowered[: self.patience]:
            found = yield from self._raise(candidate)
            self.incumbent, _, improved = yield from self.improve([found], current)
            if improved:
                return True
        return False

    def _raise(self, current: Assignment) -> Steps[Assignment]:
        """Raises the unit of most gain for its cost while the budget allows."""
        while raised := (yield from self._measured(current, +1)):
            current = raised[0]
        return current

    def _measured(self, current: Assignment, direction: int) -> Steps[list[Assignment]]:
        """Feasible single steps from the current assignment, best measured rate first, only those measured now."""
        steps: dict[int, Assignment] = {}
        cursor = self.space.knapsack.cursor(current)
        for unit in self.rng.permutation(self.moves.free).tolist():
            if (levels := cursor.peek((unit, direction))) is not None:
                steps[unit] = levels
        new = [u for u in steps if (u, direction) not in self._rates]
        known = sorted((u for u in steps if (u, direction) in self._rates), key=lambda u: self._rates[u, direction])
        chosen = [*new, *known[: self.lazy]]
        if not chosen:
            return []
        losses, reference = yield from self.measure([steps[u] for u in chosen], current)
        for unit, loss in zip(chosen, losses, strict=True):
            cost = abs(self.space.cost(steps[unit]) - self.space.cost(current)) or 1
            difference = loss - reference if math.isfinite(reference) else loss
            self._rates[unit, direction] = difference / cost
        return [steps[u] for u in sorted(chosen, key=lambda u: self._rates[u, direction])]

    def _exchange_under_floor(self) -> Steps[bool]:
        """Where the floor forbids to lower one unit alone: the best of as many random exchanges as there are units."""
        assert self.incumbent is not None
        for _ in range(self.patience):
            drawn = [self.moves.random(self.incumbent, self.rng) for _ in self.moves.free]
            candidates = [a for a in dict.fromkeys(drawn) if a is not None]
            self.incumbent, _, improved = yield from self.improve(candidates, self.incumbent)
            if improved:
                return True
        return False
