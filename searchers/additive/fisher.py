"""One-shot assignments from curvature: no loss is asked before the solution is there.

The change of the loss is taken as the sum over units of g . H . g / 2, with H the diagonal in units of the Fisher
information at the uncompressed model, along the change that a level is: HAWQ-V2 (Dong et al., arXiv 1911.03852) without
the isotropy that a trace times a squared error assumes, and NVIDIA AutoQuantize's family. Solved exactly.
"""

from __future__ import annotations

import numpy as np

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.procedure import Procedure, Steps
from evo_hpo.search.searcher import positive
from evo_hpo.search.sensitivities import READS, Kind
from evo_hpo.search.trial import Outcome, Probe
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.solvers import solve

__all__ = ["Fisher"]


class Fisher(Procedure):
    """Measures the diagonal Fisher information once, solves the knapsack that it makes, and scores the solution.

    Args:
        labels: ``sampled`` from the model's own distribution (the Fisher information), or ``true``: the text's own next
            tokens (the empirical Fisher).
        reference: ``uncompressed``, or ``uniform``: the curvature is that at the uniform assignment.
        share: of the budget that the pass may take, above 0 and at most 1; the solution's own trial is kept back.
        most_tokens: read by the pass at most; where the budget is not in tokens, so many are read.
    """

    asks_for_sensitivities = True

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        labels: str = "sampled",
        reference: str = "uncompressed",
        share: float = 1.0,
        most_tokens: int = 8192,
    ) -> None:
        super().__init__(space, seed=seed)
        if labels not in ("sampled", "true"):
            raise InvalidSettingError(f"labels={labels!r} must be 'sampled' or 'true'")
        if reference not in ("uncompressed", "uniform"):
            raise InvalidSettingError(f"reference={reference!r} must be 'uncompressed' or 'uniform'")
        if not 0 < share <= 1:
            raise InvalidSettingError(f"share={share!r} must be above 0 and at most 1")
        self.kind: Kind = "sampled" if labels == "sampled" else "true"
        self.at = None if reference == "uncompressed" else space.uniform()
        self.share, self.most_tokens = share, positive("most_tokens", most_tokens)
        self.solution: Assignment | None = None

    def steps(self) -> Steps[None]:
        """Measure, solve, score."""
        tokens = self._tokens()
        if not tokens:
            self.stop_reason = "the budget does not pay for sensitivities and a trial: the uniform assignment is scored"
            self.solution = self.space.uniform()
        else:
            found = yield from self.sensitivities(Probe(self.at, self.kind, tokens))
            effects = np.nan_to_num(found.effects(), nan=np.inf)
            rows = [row[: len(u.costs)].tolist() for row, u in zip(effects, self.space.units, strict=True)]
            self.solution = solve(self.space, rows) or self.space.uniform()
        outcomes: list[Outcome] = yield self.propose([self.solution])
        self.remember(outcomes)
        self.stop_reason = self.stop_reason or "the solution is scored"

    def recommend(self) -> Assignment | None:
        """The solution."""
        return self.solution

    def _tokens(self) -> int:
        """Tokens that the pass reads, a multiple of a trial's; 0: it cannot be paid."""
        left, each = self.allowance, self.allowance.default_tokens
        if left.evaluations is not None and left.evaluations <= READS:
            return 0
        count = max(1, self.most_tokens // max(each, 1))
        if left.tokens is not None:
            count = min(count, int(min(self.share * left.tokens, left.tokens - each)) // (READS * each))
        return count * each
