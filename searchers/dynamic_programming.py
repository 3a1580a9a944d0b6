"""Dynamic programming over a measured additive model, in the manner of SPDY (arXiv 2201.13096)."""

from __future__ import annotations

from evo_hpo.space import Assignment
from searchers.additive_model import Effects
from searchers.additive_solvers import solve
from searchers.probing import Probing

__all__ = ["DynamicProgramming"]


class DynamicProgramming(Probing):
    """Solves the additive model of single-unit probes exactly, by dynamic programming over costs.

    Settings and the probes are those of :class:`searchers.probing.Probing`. Where costs are several or too fine for a
    table, integer programming solves instead.
    """

    def solve(self, effects: Effects, start: Assignment) -> Assignment | None:
        """The optimum of the model."""
        return solve(self.space, effects, start=start, changes=self.changes)
