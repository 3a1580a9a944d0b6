"""Best of random: random assignments near uniform compression, the baseline of the EvoPress paper's tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from evo_hpo.search.procedure import OneFidelity, Steps
from evo_hpo.search.searcher import MANY, positive
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.moves import Moves

TRIES = 200


class BestOfRandom(OneFidelity):
    """The best of random assignments a few exchanges away from uniform compression; uniform itself is the first.

    Like the random initialisation of EvoPress (arXiv 2410.14649), which rounds a fractional target up everywhere and
    lowers random units until the budget holds, but also for whole targets, where that gives uniform only.

    Args:
        exchanges: the most random exchanges between uniform and a draw (each draw takes 1 to this many, uniformly);
            None: half the number of units.
        settings: ``batch``, ``tokens``, ``minibatch``, see :class:`evo_hpo.search.procedure.OneFidelity`.
    """

    def __init__(
        self, space: CompressionSpace, *, seed: int = 0, exchanges: int | None = None, **settings: Any
    ) -> None:
        super().__init__(space, seed=seed, **settings)
        self.exchanges = max(1, len(space) // 2) if exchanges is None else positive("exchanges", exchanges, most=MANY)

    def steps(self) -> Steps[None]:
        self.incumbent = self.space.uniform()
        draws = self._draws()
        while chunk := [a for _, a in zip(range(self.batch), draws, strict=False)]:
            self.incumbent, _, _ = yield from self.improve(chunk, self.incumbent)
        self.stop_reason = f"no assignment that is new in {TRIES} draws"

    def _draws(self) -> Iterator[Assignment]:
        start, moves = self.space.uniform(), Moves(self.space)
        seen = {start}
        failures = 0
        while failures < TRIES:
            drawn = moves.walk(start, int(self.rng.integers(1, self.exchanges + 1)), self.rng)
            failures = failures + 1 if drawn in seen else 0
            if drawn not in seen:
                seen.add(drawn)
                yield drawn
