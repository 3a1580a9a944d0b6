"""Uniform compression: the same level everywhere, the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence

from evo_hpo.search.budget import Allowance
from evo_hpo.search.searcher import Searcher
from evo_hpo.search.trial import Outcome, Trial
from evo_hpo.space.compression_space import Assignment

__all__ = ["Uniform"]


class Uniform(Searcher):
    """Scores the uniform assignment once; where the budget is fractional, the rest is spread evenly over the depth."""

    random = False

    def ask(self, allowance: Allowance) -> tuple[Trial, ...]:
        """The uniform assignment, once."""
        if self._asked:
            self.stop_reason = "uniform compression has one assignment"
            return ()
        return (self.trial(self.space.uniform()),)

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Nothing to learn."""

    def recommend(self) -> Assignment:
        """The uniform assignment, whatever its loss."""
        return self.space.uniform()
