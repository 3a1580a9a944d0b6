"""Random search: independent draws, uniform over all feasible assignments."""

from __future__ import annotations

from evo_hpo.search.procedure import Sampling
from evo_hpo.space.compression_space import Assignment


class RandomSearch(Sampling):
    """Independent draws, exactly uniform over all feasible assignments; recommends the best.

    Args:
        batch: trials a batch; all trials see one fixed minibatch, so the batch changes nothing but speed.
        minibatch: ``fixed`` (all trials comparable), or ``fresh`` for each batch (the incumbent is scored again in it).
    """

    def sample(self, count: int) -> list[Assignment]:
        return [self.space.sample(self.rng) for _ in range(count)]
