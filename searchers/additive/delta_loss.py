"""The first-order score of Intel AutoRound's AutoScheme (``delta_loss``), and an exact knapsack over it.

For every level the whole model is put at that level, and a backward pass of the loss gives each layer's score there:
the sum over its weights of |gradient x (uncompressed weight - compressed weight)|, summed over sequences.
"""

from __future__ import annotations

import math
from typing import Any

from evo_hpo.search.procedure import Steps
from evo_hpo.search.searcher import one_of
from evo_hpo.search.sensitivities import READS, Kind
from evo_hpo.search.trial import Probe
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.one_shot import OneShot
from searchers.additive.solvers import solve


class DeltaLoss(OneShot):
    """Puts all units at each level in turn, takes the first-order scores there, and solves the knapsack that they make.

    There are as many passes as levels, all on one minibatch, so each reads that much less.

    Args:
        loss: whose gradient: ``cross_entropy`` of the text, as published, or ``kl`` from the uncompressed model.
        settings: ``share``, ``most_tokens`` (of each pass), see :class:`searchers.additive.one_shot.OneShot`.
    """

    def __init__(self, space: CompressionSpace, *, seed: int = 0, loss: str = "cross_entropy", **settings: Any) -> None:
        super().__init__(space, seed=seed, **settings)
        self.kind: Kind = "true" if one_of("loss", loss, "cross_entropy", "kl") == "cross_entropy" else "kl"
        limits = list(zip(space.lowest, space.highest, strict=True))
        depth = max(high - low for low, high in limits) + 1
        self.references = [tuple(min(low + k, high) for low, high in limits) for k in range(depth)]

    @property
    def reads(self) -> int:
        """Of one pass a level."""
        return READS * len(self.references)

    def find(self, tokens: int) -> Steps[Assignment | None]:
        """One pass a level, one exact solution."""
        effects = [[math.inf] * len(unit.costs) for unit in self.space.units]
        for number, at in enumerate(self.references):
            draw = "same" if number else "fresh"
            found = yield from self.sensitivities(Probe(at, self.kind, tokens, draw, form="absolute"))  # type: ignore[arg-type]
            scores = found.effects()
            for unit, level in enumerate(at):
                effects[unit][level] = float(scores[unit, level])
        return solve(self.space, effects)
