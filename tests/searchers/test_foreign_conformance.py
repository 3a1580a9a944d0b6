"""The conformance suite over the searchers of other libraries: one of each kind, and every encoding."""

from __future__ import annotations

from types import MappingProxyType

from evo_hpo.testing import SearcherConformance
from searchers.encoding import ENCODINGS
from searchers.nevergrad_adapter import NevergradSearcher


class TestOptunasSamplers(SearcherConformance):
    names = ("optuna:cmaes", "optuna:nsga2", "optuna:qmc", "optuna:random", "optuna:tpe", "optuna:tpe_univariate")
    evaluations = 24
    settings = MappingProxyType({"batch": 3})


class TestOptunasGaussianProcess(SearcherConformance):
    names = ("optuna:gp",)
    evaluations = 12  # the model takes over after ten
    settings = MappingProxyType({"sampler": {"n_startup_trials": 10}})


class TestNevergradsOptimizers(SearcherConformance):
    names = (
        "nevergrad:CMA",
        "nevergrad:DE",
        "nevergrad:DiscreteOnePlusOne",
        "nevergrad:NGOpt",
        "nevergrad:PSO",
        "nevergrad:Portfolio",
        "nevergrad:TBPSA",
    )


class TestNevergradInBatches(SearcherConformance):
    names = ("nevergrad:TwoPointsDE", "nevergrad:DiscreteLenglerOnePlusOne")
    settings = MappingProxyType({"batch": 5, "start": "none", "tokens": 32, "minibatch": "fresh"})


def _with_encoding(name: str, encoding: str) -> type[SearcherConformance]:
    body = {"names": (name,), "settings": MappingProxyType({"encoding": encoding}), "evaluations": 16}
    return type(f"Test{encoding.title().replace('_', '')}", (SearcherConformance,), body)


for _encoding in ENCODINGS:
    _library = "nevergrad:OnePlusOne" if _encoding in NevergradSearcher.encodings else "optuna:nsga2"
    globals()[f"Test{_encoding.title().replace('_', '')}"] = _with_encoding(_library, _encoding)


def test_the_suite_covers_every_encoding() -> None:
    for encoding in ENCODINGS:
        suite = globals()[f"Test{encoding.title().replace('_', '')}"]
        assert suite.settings["encoding"] == encoding
