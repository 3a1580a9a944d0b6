"""Local search: best improvement over exchanges of one level step, restarted from the best by growing kicks."""

from __future__ import annotations

import itertools
from typing import Any

from evo_hpo.search.procedure import OneFidelity, Steps
from evo_hpo.search.searcher import MANY, one_of, positive
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.moves import Moves

VAIN = 200
"""Descents in a row that measure nothing new, before the search ends."""


class LocalSearch(OneFidelity):
    """Moves to the best neighbour (one unit a step up, one down, or both) until none is better, then kicks the best.

    Iterated local search: the kick is ``kick`` random exchanges, one more after each descent that found nothing better.
    The neighbourhood of n units has about n(n - 1) members, so by default a descent moves to the best of each batch
    of unseen neighbours; only the proof of a local optimum needs all of them.

    Args:
        improvement: ``batch``: move after each batch that has a better neighbour; ``best``: look at all neighbours
            first (steepest descent); ``first``: a batch of one.
        groups: between which units a step is exchanged: ``none`` (any two), ``size`` or ``name``.
        kick: exchanges of the first kick after a local optimum.
        settings: ``batch``, ``tokens``, ``minibatch``, see :class:`evo_hpo.search.procedure.OneFidelity`.
    """

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        improvement: str = "batch",
        groups: str = "none",
        kick: int = 2,
        **settings: Any,
    ) -> None:
        super().__init__(space, seed=seed, **settings)
        self.improvement = one_of("improvement", improvement, "batch", "best", "first")
        self.moves = Moves(space, groups)
        self.kick = positive("kick", kick, most=MANY)

    def steps(self) -> Steps[None]:
        self.incumbent = yield from self._descend(self.space.uniform(), leads=True)
        kick, vain = self.kick, 0
        while vain <= VAIN:
            known = len(self._known)
            start = self.moves.walk(self.incumbent, kick, self.rng)
            if start == self.incumbent:  # exchanges took each other back, or chance found none
                start = next(self.moves.neighbours(self.incumbent, self.rng), self.incumbent)
            if start == self.incumbent:
                self.stop_reason = "no exchange keeps the budget"
                return
            found = yield from self._descend(start)
            self.incumbent, _, better = yield from self.improve([found], self.incumbent)
            kick = self.kick if better else min(kick + 1, max(self.kick, len(self.space) // 2))
            vain = 0 if self.minibatch == "fresh" or len(self._known) > known else vain + 1
        self.stop_reason = f"nothing that is new in {VAIN} descents"

    def _descend(self, current: Assignment, leads: bool = False) -> Steps[Assignment]:
        size = {"batch": self.batch, "first": 1, "best": len(self.space) ** 2 * 2}[self.improvement]
        improved = True
        while improved:
            improved = False
            neighbours = self.moves.neighbours(current, self.rng)
            while not improved and (chunk := list(itertools.islice(neighbours, size))):
                self._idle = 0  # a long neighbourhood may well be known; descents in vain are counted instead
                current, _, improved = yield from self.improve(chunk, current)
                if leads:
                    self.incumbent = current
        return current
