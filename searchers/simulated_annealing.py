"""Simulated annealing over exchanges of level steps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from evo_hpo.search.procedure import OneFidelity, Steps
from evo_hpo.search.searcher import number, positive
from evo_hpo.space.compression_space import CompressionSpace
from searchers.moves import Moves

COOLEST = 1e-3  # last temperature, as a share of the first
FROZEN = 400  # proposals in a row that were scored before, after which the next cooling begins


class SimulatedAnnealing(OneFidelity):
    """Metropolis acceptance under geometric cooling over the whole budget, from uniform (Kirkpatrick et al., 1983).

    The first temperature is ``heat`` times the median loss difference of ``probes`` random exchanges from uniform, so
    it needs no scale; cooling ends at a thousandth of it when the budget ends. Under a budget of seconds it cools over
    ``cooling_steps`` proposals and starts over from the best.

    Args:
        heat: first temperature, in median loss differences.
        probes: trials that set the first temperature.
        cooling_steps: proposals of one cooling under a budget of seconds.
        groups: between which units a step is exchanged: ``none`` (any two), ``size`` or ``name``.
        batch: trials a batch while probing; proposals are made one at a time.
        settings: ``batch``, ``tokens``, ``minibatch``, see :class:`evo_hpo.search.procedure.OneFidelity`.
    """

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        heat: float = 0.5,
        probes: int = 8,
        cooling_steps: int = 1000,
        groups: str = "none",
        **settings: Any,
    ) -> None:
        super().__init__(space, seed=seed, **settings)
        self.heat = number("heat", heat)
        self.probes = positive("probes", probes)
        self.cooling_steps = positive("cooling_steps", cooling_steps)
        self.moves = Moves(space, groups)

    def steps(self) -> Steps[None]:
        self.incumbent = self.space.uniform()
        starts = [self.moves.random(self.incumbent, self.rng) for _ in range(self.probes)]
        candidates = [a for a in dict.fromkeys(starts) if a is not None]
        candidates = candidates or list(itertools.islice(self.moves.neighbours(self.incumbent, self.rng), self.probes))
        if not candidates:
            self.stop_reason = "no exchange keeps the budget"
            return
        losses, reference = yield from self.measure(candidates, self.incumbent)
        differences = [abs(loss - reference) for loss in losses if math.isfinite(loss - reference)]
        hottest = self.heat * float(np.median(differences)) if differences else 1.0
        self.incumbent, _, _ = yield from self.improve(candidates, self.incumbent)
        while True:
            yield from self._cool(hottest or 1.0)

    def _cool(self, hottest: float) -> Steps[None]:
        paid_each = 2 if self.minibatch == "fresh" else 1
        length = max(1, self.trials_left(self.cooling_steps * paid_each) // paid_each)
        current = self.incumbent
        assert current is not None
        idle = 0
        behind = 0.0  # loss of the current assignment above the incumbent, summed over accepted moves
        for step in range(length):
            proposal = self.moves.random(current, self.rng)
            threshold = float(self.rng.random())
            if proposal is None:
                continue
            known = len(self._known)
            (loss,), reference = yield from self.measure([proposal], current)
            idle = 0 if len(self._known) > known else idle + 1
            if idle > FROZEN and self.minibatch == "fixed":
                break
            temperature = hottest * COOLEST ** (step / length)
            rise = loss - reference if math.isfinite(reference) else (-math.inf if math.isfinite(loss) else math.inf)
            if rise <= 0 or threshold < math.exp(-min(rise / temperature, 700.0)):
                current, behind = proposal, behind + rise
            if behind < 0:
                self.incumbent, behind = current, 0.0
        yield from self.measure([], current)
