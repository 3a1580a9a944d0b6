"""Brute force: every feasible assignment, for spaces that are small enough."""

from __future__ import annotations

import itertools

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.procedure import OneFidelity, Steps
from evo_hpo.search.searcher import positive
from evo_hpo.space.compression_space import CompressionSpace


class BruteForce(OneFidelity):
    """Scores every feasible assignment once, in lexicographic order, on one minibatch; the best is the optimum there.

    Args:
        limit: the most assignments that the space may have.

    Raises:
        InvalidSettingError: the space is larger than the limit.
    """

    random = False

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        limit: int = 1_000_000,
        batch: int = 64,
        tokens: int | None = None,
    ) -> None:
        super().__init__(space, seed=seed, batch=batch, tokens=tokens)
        count = space.count()
        if count > positive("limit", limit):
            raise InvalidSettingError(
                f"brute force over {count} assignments is above limit={limit}: raise the limit or search instead"
            )

    def steps(self) -> Steps[None]:
        assignments = self.space.enumerate()
        while chunk := list(itertools.islice(assignments, self.batch)):
            yield self.request(chunk)
        self.stop_reason = "every feasible assignment is scored"
