"""Uniform compression: the same level everywhere, the baseline of every comparison."""

from __future__ import annotations

from evo_hpo.search.procedure import Procedure, Steps
from evo_hpo.space.compression_space import Assignment
from evo_hpo.space.ranges import uniform_at


class Uniform(Procedure):
    """Scores the uniform assignment once; where the budget is fractional, the rest is spread evenly over the depth.

    Over a range of budgets, at each of its marks.
    """

    random = False

    def steps(self) -> Steps[None]:
        yield self.propose(uniform_at(self.space) if self.space.ranged else [self.space.uniform()])
        self.stop_reason = "uniform compression has one assignment" + (" a budget" if self.space.ranged else "")

    def front(self) -> list[Assignment]:
        """Uniform compression at each mark, whatever it loses, scored or not."""
        return uniform_at(self.space)

    def recommend(self) -> Assignment:
        """The uniform assignment, whatever its loss."""
        return self.space.uniform()
