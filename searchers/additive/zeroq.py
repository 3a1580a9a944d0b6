"""Sensitivities without data: on text that the model writes itself.

ZeroQ (Cai et al., arXiv 2001.00281) measures the KL divergence that each layer and bit-width makes on inputs distilled
from the model, and takes the best of the budget. A language model's own samples are such inputs (LLM-QAT, Liu et al.,
arXiv 2305.17888). A KL for each of a thousand units and levels is beyond any budget here, so its curvature stands in
for it: the labels of text that the model has drawn are drawn from the model, so their gradients give its Fisher
information.
"""

from __future__ import annotations

from evo_hpo.search.procedure import Steps
from evo_hpo.search.sensitivities import READS
from evo_hpo.search.trial import Probe
from evo_hpo.space.compression_space import Assignment
from searchers.additive.one_shot import OneShot, effects_of
from searchers.additive.solvers import solve


class ZeroQ(OneShot):
    """Lets the model write, measures the Fisher information on that, and solves the knapsack that it makes.

    A token is charged four times: once when it is written, three times in the pass. The solution's own trial is the
    only thing that reads calibration text. Settings: see :class:`searchers.additive.one_shot.OneShot`.
    """

    @property
    def reads(self) -> int:
        """One more, for writing."""
        return READS + 1

    def find(self, tokens: int) -> Steps[Assignment | None]:
        """One pass over the model's own text, one exact solution."""
        found = yield from self.sensitivities(Probe(None, "true", tokens, generated=True))
        return solve(self.space, effects_of(self.space, found.effects()))
