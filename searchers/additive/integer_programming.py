"""Integer programming over a measured additive model: a multiple-choice knapsack, solved by HiGHS."""

from __future__ import annotations

from evo_hpo.space.compression_space import Assignment
from searchers.additive.model import Effects
from searchers.additive.probing import Probing
from searchers.additive.solvers import solve_by_integer_programming


class IntegerProgramming(Probing):
    """Solves the additive model of single-unit probes exactly, by a mixed-integer solver; any number of resources.

    Settings and the probes are those of :class:`searchers.additive.probing.Probing`.
    """

    def solve(self, effects: Effects, start: Assignment) -> Assignment | None:
        return solve_by_integer_programming(self.space, effects, start=start, changes=self.changes)
