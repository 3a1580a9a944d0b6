"""Random search: independent draws, uniform over all feasible assignments."""

from __future__ import annotations

from collections.abc import Sequence

from evo_hpo.search.budget import Allowance
from evo_hpo.search.searcher import Searcher, draw, positive
from evo_hpo.search.trial import Outcome, Trial
from evo_hpo.space.compression_space import Assignment, CompressionSpace

__all__ = ["RandomSearch"]


class RandomSearch(Searcher):
    """Independent draws, exactly uniform over all feasible assignments; recommends the best.

    Args:
        batch: trials a batch; all trials see one fixed minibatch, so the batch changes nothing but speed.
        tokens: calibration tokens a trial; None: the problem's default.
        minibatch: ``fixed`` (all trials comparable), or ``fresh`` for each batch (the incumbent is scored again in it).
    """

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        batch: int = 8,
        tokens: int | None = None,
        minibatch: str = "fixed",
    ) -> None:
        super().__init__(space, seed=seed)
        self.batch = positive("batch", batch)
        self.tokens = tokens if tokens is None else positive("tokens", tokens)
        self.minibatch = draw("minibatch", minibatch)
        self.incumbent: Assignment | None = None

    def ask(self, allowance: Allowance) -> tuple[Trial, ...]:
        """A batch of fresh draws, behind the incumbent where the minibatch is fresh."""
        again = [] if self.incumbent is None or self.minibatch == "fixed" else [self.incumbent]
        count = max(1, allowance.affords(self.batch + len(again), self.tokens)) - len(again)
        levels = again + [self.space.sample(self.rng) for _ in range(count)]
        return tuple(self.trial(a, tokens=self.tokens, minibatch=self.minibatch) for a in levels)

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Remembers the best, of this batch where the minibatch is fresh."""
        self.remember(outcomes)
        usable = [o for o in outcomes if o.usable]
        if usable:
            self.incumbent = min(usable, key=lambda o: o.loss).trial.levels

    def recommend(self) -> Assignment | None:
        """The best on the fixed minibatch; on fresh ones, where losses do not compare, the last batch's best."""
        return super().recommend() if self.minibatch == "fixed" else self.incumbent
