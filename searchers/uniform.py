"""Uniform compression: the same level everywhere, the baseline of every comparison."""

from __future__ import annotations

from evo_hpo.search.procedure import Procedure, Steps
from evo_hpo.space.compression_space import Assignment

__all__ = ["Uniform"]


class Uniform(Procedure):
    """Scores the uniform assignment once; where the budget is fractional, the rest is spread evenly over the depth."""

    random = False

    def steps(self) -> Steps[None]:
        yield self.propose([self.space.uniform()])
        self.stop_reason = "uniform compression has one assignment"

    def recommend(self) -> Assignment:
        """The uniform assignment, whatever its loss."""
        return self.space.uniform()
