"""Random search: independent draws, uniform over all feasible assignments."""

from __future__ import annotations

from collections.abc import Sequence

from evo_hpo.budget import Allowance
from evo_hpo.searcher import Searcher, draw, positive
from evo_hpo.space import CompressionSpace
from evo_hpo.trial import Outcome, Trial

__all__ = ["RandomSearch"]


class RandomSearch(Searcher):
    """Independent draws, exactly uniform over all feasible assignments; recommends the best.

    Args:
        batch: trials a batch; all trials see one fixed minibatch, so the batch changes nothing but speed.
        tokens: calibration tokens a trial; None: the problem's default.
        minibatch: ``fixed`` (all trials comparable) or ``fresh`` for each batch.
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

    def ask(self, allowance: Allowance) -> tuple[Trial, ...]:
        """A batch of fresh draws."""
        count = max(1, allowance.affords(self.batch, self.tokens))
        return tuple(
            self.trial(self.space.sample(self.rng), tokens=self.tokens, minibatch=self.minibatch) for _ in range(count)
        )

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Remembers the best."""
        self.remember(outcomes)
