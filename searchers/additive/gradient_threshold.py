"""A threshold on first-order sensitivities, bisected to the budget: ``dynamic_quant`` of Apple's mlx-lm.

There every layer is at low bits, the gradient of the KL divergence from the uncompressed model is taken once, and a
layer's sensitivity is gradient . (low - high) over its number of weights. Layers above a threshold get high bits, and
the threshold is bisected to the target. No knapsack is solved.

With more than two levels a unit has one sensitivity a step, for each unit of cost that the step takes, and goes up
while they are above the threshold. With two levels of one width of step this is the published method.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.procedure import Steps
from evo_hpo.search.trial import Probe
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.one_shot import OneShot, effects_of


class GradientThreshold(OneShot):
    """Thresholds each unit's first-order gain, seen from all units at their cheapest, at what the budget allows.

    What the threshold leaves of the budget stays unspent, as published.

    Args:
        choices: levels (0: a unit's cheapest) that a threshold chooses among, ascending, as [0, 2]: two are the
            published choice between low and high bits; None: all.
        settings: ``share``, ``most_tokens``, see :class:`searchers.additive.one_shot.OneShot`.
    """

    def __init__(
        self, space: CompressionSpace, *, seed: int = 0, choices: Sequence[int] | None = None, **settings: Any
    ) -> None:
        super().__init__(space, seed=seed, **settings)
        chosen = list(range(max(len(unit.costs) for unit in space.units))) if choices is None else list(choices)
        if len(chosen) < 2 or chosen != sorted(set(chosen)) or chosen[0] < 0:
            raise InvalidSettingError(f"choices={choices!r} must be two or more levels, ascending, from 0 on")
        self.ladders = [
            sorted({min(max(k, low), high) for k in chosen})
            for low, high in zip(space.lowest, space.highest, strict=True)
        ]

    def find(self, tokens: int) -> Steps[Assignment | None]:
        """One pass with all units at their cheapest, one bisection."""
        found = yield from self.sensitivities(Probe(self.space.lowest, "kl", tokens))
        losses = effects_of(self.space, found.effects())
        steps = [
            [(b, (losses[u][a] - losses[u][b]) / max(1, costs[b] - costs[a])) for a, b in itertools.pairwise(ladder)]
            for u, (ladder, costs) in enumerate(zip(self.ladders, self.space.knapsack.first_costs, strict=True))
        ]
        thresholds = sorted({s for unit in steps for _, s in unit} | {-math.inf})
        low, high = 0, len(thresholds) - 1  # the highest takes no step
        while low < high:
            middle = (low + high) // 2
            if self.space.knapsack.cursor(self._above(thresholds[middle], steps)).within:
                high = middle
            else:
                low = middle + 1
        levels = self._above(thresholds[low], steps)
        return levels if self.space.feasible(levels) else self.space.repair(levels)

    def _above(self, threshold: float, steps: Sequence[Sequence[tuple[int, float]]]) -> Assignment:
        """Every unit raised by the steps whose sensitivity is above the threshold, up to the first that is not."""
        levels = [ladder[0] for ladder in self.ladders]
        for unit, ladder in enumerate(steps):
            for level, _ in itertools.takewhile(lambda step: step[1] > threshold, ladder):
                levels[unit] = level
        return tuple(levels)
