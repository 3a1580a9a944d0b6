"""Random search: independent draws, uniform over all feasible assignments."""

from __future__ import annotations

from evo_hpo.search.procedure import OneFidelity, Steps

__all__ = ["RandomSearch"]


class RandomSearch(OneFidelity):
    """Independent draws, exactly uniform over all feasible assignments; recommends the best.

    Args:
        batch: trials a batch; all trials see one fixed minibatch, so the batch changes nothing but speed.
        tokens: calibration tokens a trial; None: the problem's default.
        minibatch: ``fixed`` (all trials comparable), or ``fresh`` for each batch (the incumbent is scored again in it).
    """

    def steps(self) -> Steps[None]:
        """Draws for ever, behind the incumbent where the minibatch is fresh, and keeps the best of each batch."""
        while True:
            yield None  # draws no more than can be paid
            again = [] if self.incumbent is None or self.minibatch == "fixed" else [self.incumbent]
            count = max(1, self.allowance.affords(self.batch + len(again), self.tokens)) - len(again)
            outcomes = yield self.request(again + [self.space.sample(self.rng) for _ in range(count)])
            usable = [o for o in outcomes if o.usable]
            if usable:
                self.incumbent = min(usable, key=lambda o: o.loss).trial.levels
