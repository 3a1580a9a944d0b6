"""One-shot assignments from curvature.

The change of the loss is taken as the sum over units of g . H . g / 2, with H the diagonal in units of the Fisher
information at the uncompressed model, along the change that a level is. Two relatives assume more and are settings:

- HAWQ-V2 (Dong et al., arXiv 1911.03852) takes each unit's H as a multiple of the identity: the trace over the number
  of weights, times the squared error of the weights (``effect = "trace"``; here the Fisher information's trace).
- NVIDIA ModelOpt's AutoQuantize takes H as diagonal in each layer's outputs: squared gradient times squared change of
  the output (``labels = "true", effect = "output"``), and a linear program over the formats.
"""

from __future__ import annotations

from typing import Any

from evo_hpo.search.procedure import Steps
from evo_hpo.search.searcher import one_of
from evo_hpo.search.sensitivities import Form, Kind
from evo_hpo.search.trial import Probe
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.one_shot import OneShot, effects_of
from searchers.additive.solvers import solve

FORMS: dict[str, Form] = {"projection": "inner", "trace": "trace", "output": "output"}


class Fisher(OneShot):
    """Measures the diagonal Fisher information once, solves the knapsack that it makes, and scores the solution.

    Args:
        labels: ``sampled`` from the model's own distribution (the Fisher information), or ``true``: the text's own next
            tokens (the empirical Fisher).
        reference: ``uncompressed``, or ``uniform``: the curvature is that at the uniform assignment.
        effect: ``projection``: squared gradient along the change; ``trace`` times squared error, as in HAWQ-V2;
            ``output``: squared gradient times squared error of the output, as in AutoQuantize.
        settings: ``share``, ``most_tokens``, see :class:`searchers.additive.one_shot.OneShot`.
    """

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        labels: str = "sampled",
        reference: str = "uncompressed",
        effect: str = "projection",
        **settings: Any,
    ) -> None:
        super().__init__(space, seed=seed, **settings)
        self.kind: Kind = "sampled" if one_of("labels", labels, "sampled", "true") == "sampled" else "true"
        at_uniform = one_of("reference", reference, "uncompressed", "uniform") == "uniform"
        self.at = space.uniform() if at_uniform else None
        self.form = FORMS[one_of("effect", effect, *FORMS)]

    def find(self, tokens: int) -> Steps[Assignment | None]:
        """One pass, one exact solution."""
        found = yield from self.sensitivities(Probe(self.at, self.kind, tokens, form=self.form))
        return solve(self.space, effects_of(self.space, found.effects()))
