"""Dynamic programming over a measured additive model, in the manner of SPDY (arXiv 2201.13096)."""

from __future__ import annotations

from evo_hpo.space.compression_space import Assignment
from searchers.additive.model import Effects
from searchers.additive.probing import Probing
from searchers.additive.solvers import solve


class DynamicProgramming(Probing):
    """Solves the additive model of single-unit probes exactly, by dynamic programming over costs.

    Settings and probes are those of :class:`searchers.additive.probing.Probing`. Where costs are several or too fine
    for a table, they are solved from the prices of a linear programme.
    """

    def solve(self, effects: Effects, start: Assignment) -> Assignment | None:
        return solve(self.space, effects, start=start, changes=self.changes)
