"""Every unit's better levels measured end to end, one at a time, then greedy by gain for bits: ExLlamaV3's optimizer.

``measure_model`` of ExLlamaV3 takes the cheapest quantized model as the base, puts each group of layers at each better
level by itself, and measures how that changes the KL divergence from the uncompressed model; ``optimize_model`` then
raises, again and again, the group and level of most gain for the bits it needs, as far as the budget reaches.
"""

from __future__ import annotations

import math
from typing import Any

from evo_hpo.search.procedure import OneFidelity, Steps
from evo_hpo.search.searcher import number, positive
from evo_hpo.space.compression_space import Assignment, CompressionSpace

UNKNOWN = math.inf  # change of the loss that was not measured
EVERYTHING = 10**6  # trials where the budget is in seconds


class MeasuredGreedy(OneFidelity):
    """Measures units raised from the cheapest assignment, alone or in groups, and spends the budget by measured gain.

    Where the budget does not pay for every unit and level, neighbouring units are measured together (as ExLlamaV3
    measures whole layers): as many groups of equal length as it pays for, and a group's gain is shared by its units in
    proportion to the bits that each takes. The last trial is kept for the solution.

    Args:
        group: units measured together; None: as few as the budget pays for.
        power: exponent of gains before they are compared; 0.69 as published, 1: as measured.
        settings: ``batch``, ``tokens``, ``minibatch``, see :class:`evo_hpo.search.procedure.OneFidelity`.
    """

    def __init__(
        self, space: CompressionSpace, *, seed: int = 0, group: int | None = None, power: float = 0.69, **settings: Any
    ) -> None:
        super().__init__(space, seed=seed, **settings)
        self.group = group if group is None else positive("group", group)
        self.power = number("power", power)
        self.base = space.lowest if space.feasible(space.lowest) else space.repair(space.lowest)

    def steps(self) -> Steps[None]:
        """Measure, spend, score."""
        trials = self._trials(self.trials_left(EVERYTHING) - 2)
        order = [trials[i] for i in self.rng.permutation(len(trials))]
        losses, reference = yield from self.measure([levels for levels, _ in order], self.base)
        gains = [
            [0.0 if k == at else UNKNOWN for k in range(len(u.costs))]
            for u, at in zip(self.space.units, self.base, strict=True)
        ]
        for (levels, members), loss in zip(order, losses, strict=True):
            self._share(gains, levels, members, loss - reference if math.isfinite(reference) else UNKNOWN)
        solution = self._spend(gains)
        better, _, improved = yield from self.improve([solution], self.base)
        self.incumbent = better if improved else self.incumbent
        self.stop_reason = "the solution is scored"

    def _trials(self, affordable: int) -> list[tuple[Assignment, list[int]]]:
        """Assignments with one group at one better level each, and the members that are raised in it."""
        free = [u for u in self.space.knapsack.free if self.base[u] < self.space.highest[u]]
        for size in range(self.group or 1, (self.group or max(1, len(free))) + 1):
            groups = [free[i : i + size] for i in range(0, len(free), size)]
            found = [raised for members in groups for raised in self._raised(members)]
            if len(found) <= affordable:
                return found
        return found[: max(0, affordable)]

    def _raised(self, members: list[int]) -> list[tuple[Assignment, list[int]]]:
        found: dict[Assignment, list[int]] = {}
        for level in range(1, max(len(self.space.units[u].costs) for u in members)):
            levels = list(self.base)
            for unit in members:
                levels[unit] = max(self.base[unit], min(level, self.space.highest[unit]))
            changed = [u for u in members if levels[u] != self.base[u]]
            if changed and self.space.feasible(levels):
                found.setdefault(tuple(levels), changed)
        return list(found.items())

    def _share(self, gains: list[list[float]], levels: Assignment, members: list[int], change: float) -> None:
        """Books a change of the loss to the units that were raised, by the cost that each takes."""
        if not math.isfinite(change):
            return
        change = change if change > 0 else -((-change) ** self.power)
        taken = {u: self._cost(u, self.base[u], levels[u]) for u in members}
        for unit, cost in taken.items():
            gains[unit][levels[unit]] = change * cost / sum(taken.values())

    def _cost(self, unit: int, below: int, above: int) -> int:
        costs = self.space.knapsack.first_costs[unit]
        return max(1, costs[above] - costs[below])

    def _spend(self, gains: list[list[float]]) -> Assignment:
        """Raises the unit and level of most gain for its cost, while that fits and is a gain."""
        cursor = self.space.knapsack.cursor(self.base)
        while True:
            rates = sorted(
                ((gains[u][k] - gains[u][at]) / self._cost(u, at, k), u, k)
                for u, at in enumerate(cursor.levels)
                for k in range(at + 1, self.space.highest[u] + 1)
                if gains[u][k] < gains[u][at]
            )
            for _, unit, level in rates:
                if min(cursor.after(unit, level - cursor.levels[unit])) >= 0:
                    cursor.step(unit, level - cursor.levels[unit])
                    break
            else:
                return cursor.assignment() or self.space.repair(cursor.levels)
