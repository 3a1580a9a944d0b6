"""Integer programming over a measured additive model: a multiple-choice knapsack, solved by HiGHS."""

from __future__ import annotations

from evo_hpo.space import Assignment
from searchers.additive_model import Effects
from searchers.additive_solvers import solve_by_integer_programming
from searchers.probing import Probing

__all__ = ["IntegerProgramming"]


class IntegerProgramming(Probing):
    """Solves the additive model of single-unit probes exactly, by a mixed-integer solver; any number of resources.

    Settings and the probes are those of :class:`searchers.probing.Probing`.
    """

    def solve(self, effects: Effects, start: Assignment) -> Assignment | None:
        """The optimum of the model."""
        return solve_by_integer_programming(self.space, effects, start=start, changes=self.changes)
