"""What one-shot opponents share: measure sensitivities, solve for an assignment, score it once."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.procedure import Procedure, Steps
from evo_hpo.search.searcher import positive
from evo_hpo.search.sensitivities import READS
from evo_hpo.search.trial import Outcome
from evo_hpo.space.compression_space import Assignment, CompressionSpace

WITHOUT_A_LIMIT = 8192
"""Tokens of a pass where nothing says how many the budget pays for."""


class OneShot(Procedure):
    """Asks for no loss before its solution is there, and for one then: that of the solution.

    Args:
        share: of the budget that the passes may take, above 0 and at most 1; the solution's own trial is kept back.
        most_tokens: read by each pass at most; by default no limit, and 8192 where the budget is not in tokens.
    """

    asks_for_sensitivities = True

    def __init__(
        self, space: CompressionSpace, *, seed: int = 0, share: float = 1.0, most_tokens: int | None = None
    ) -> None:
        super().__init__(space, seed=seed)
        if not 0 < share <= 1:
            raise InvalidSettingError(f"share={share!r} must be above 0 and at most 1")
        self.share = share
        self.most_tokens = None if most_tokens is None else positive("most_tokens", most_tokens)
        self.solution: Assignment | None = None

    @property
    def reads(self) -> int:
        """Tokens charged for each token that all passes together are given."""
        return READS

    @abstractmethod
    def find(self, tokens: int) -> Steps[Assignment | None]:
        """Measures on so many tokens a pass, and solves; None: there is no solution."""

    def steps(self) -> Steps[None]:
        """Measure, solve, score."""
        tokens = self._tokens()
        if not tokens:
            self.stop_reason = "the budget does not pay for sensitivities and a trial: the uniform assignment is scored"
            self.solution = self.space.uniform()
        else:
            self.solution = (yield from self.find(tokens)) or self.space.uniform()
        outcomes: list[Outcome] = yield self.propose([self.solution])
        self.remember(outcomes)
        self.stop_reason = self.stop_reason or "the solution is scored"

    def recommend(self) -> Assignment | None:
        """The solution."""
        return self.solution

    def _tokens(self) -> int:
        """Tokens that each pass reads, a multiple of a trial's; 0: they cannot be paid."""
        left, each = self.allowance, self.allowance.default_tokens
        if left.evaluations is not None and left.evaluations <= self.reads:
            return 0
        count = max(1, (self.most_tokens or left.tokens or WITHOUT_A_LIMIT) // max(each, 1))
        if left.tokens is not None:
            paid = int(min(self.share * left.tokens, left.tokens - each)) // (self.reads * each)
            count = min(count, max(0, paid))
        return count * each


def effects_of(space: CompressionSpace, measured: np.ndarray[Any, Any]) -> list[list[float]]:
    """Measured effects, units x levels, as rows of each unit's levels; what is not finite is forbidden."""
    found = np.where(np.isfinite(measured), measured, np.inf)
    return [row[: len(unit.costs)].tolist() for row, unit in zip(found, space.units, strict=True)]
