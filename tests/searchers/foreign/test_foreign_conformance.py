"""The conformance suite over the searchers of other libraries: one of each kind, and every encoding in each library.

    EVO_HPO_CONFORMANCE=all pytest tests/searchers/foreign/test_foreign_conformance.py

runs it over every optimizer of Nevergrad's registry that can work, and every sampler with every encoding (an hour).
"""

from __future__ import annotations

import os
from types import MappingProxyType

from evo_hpo.search.conformance import SearcherConformance
from evo_hpo.search.registry import make_searcher
from evo_hpo.search.searcher import Searcher
from evo_hpo.space.compression_space import CompressionSpace
from searchers.foreign.encoding import ENCODINGS
from searchers.foreign.nevergrad_adapter import NevergradSearcher
from searchers.foreign.nevergrad_adapter import family as nevergrad
from searchers.foreign.optuna_adapter import family as optuna

ALL = os.environ.get("EVO_HPO_CONFORMANCE") == "all"
KINDS = ("CMA", "DE", "DiscreteOnePlusOne", "NGOpt", "PSO", "Portfolio", "TBPSA")
# fmt: off
STILL = frozenset((
    "BFGS", "CMAsmall", "CMAstd", "CMAtuning", "CSEC", "CSEC10", "CSEC11", "DS3p", "DSbase", "DSproba", "DSsubspace",
    "LocalBFGS", "MicroCMA", "MicroSPSA", "MicroSQP", "MilliCMA", "MultiDS", "NelderMead", "SDiagonalCMA", "SPSA",
    "SQP", "SplitCSEC11", "TinyCMA", "TinyLhsDE", "TinyQODE", "TinySPSA", "TinySQP", "Zero",
))
# fmt: on
"""They are deterministic, or do not leave their start within so few trials, so that seeds make no difference."""
SAMPLERS = tuple(s for s in optuna.members() if s != "gp")


class TestOptunasSamplers(SearcherConformance):
    names = tuple(f"optuna:{s}" for s in SAMPLERS)
    evaluations = 24
    settings = MappingProxyType({"batch": 3})


class TestOptunasGaussianProcess(SearcherConformance):
    names = ("optuna:gp",)
    evaluations = 12  # the model takes over after ten
    settings = MappingProxyType({"sampler": {"n_startup_trials": 10}})


class TestNevergradsOptimizers(SearcherConformance):
    names = tuple(f"nevergrad:{o}" for o in (nevergrad.members() if ALL else KINDS))

    def test_different_seeds_differ(self, name: str) -> None:
        """Where seeds can make a difference so early."""
        if name.partition(":")[2] not in STILL:
            super().test_different_seeds_differ(name)


class TestNevergradInBatches(SearcherConformance):
    names = ("nevergrad:TwoPointsDE", "nevergrad:DiscreteLenglerOnePlusOne")
    settings = MappingProxyType({"batch": 5, "start": "none", "tokens": 32, "minibatch": "fresh"})


class TestOptunaOnFreshMinibatches(SearcherConformance):
    names = ("optuna:nsga2",)
    evaluations = 24
    settings = MappingProxyType({"batch": 4, "minibatch": "fresh"})


class TestEncodings(SearcherConformance):
    names = tuple(
        f"{name} {encoding}"
        for encoding in ENCODINGS
        for name in (
            *(f"optuna:{s}" for s in (SAMPLERS if ALL else ("nsga2",))),
            *(f"nevergrad:{o}" for o in (KINDS if ALL else ("OnePlusOne",))),
        )
        if name.startswith("optuna") or encoding in NevergradSearcher.encodings
    )
    evaluations = 16

    def searcher(self, name: str, space: CompressionSpace, seed: int) -> Searcher:
        """The searcher with the encoding that stands behind its name."""
        optimizer, _, encoding = name.partition(" ")
        return make_searcher(optimizer, space, seed=seed, encoding=encoding)

    def test_different_seeds_differ(self, name: str) -> None:
        """Where seeds can make a difference so early."""
        if name != "nevergrad:NGOpt keys":
            super().test_different_seeds_differ(name)


def test_the_suite_covers_every_sampler_and_every_encoding() -> None:
    assert {name.partition(" ")[2] for name in TestEncodings.names} == set(ENCODINGS)
    covered = {*TestOptunasSamplers.names, *TestOptunasGaussianProcess.names}
    assert covered == {f"optuna:{s}" for s in optuna.members()}
