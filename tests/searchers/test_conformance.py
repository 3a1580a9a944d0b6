"""The conformance suite over our own searchers; those of other libraries run it beside their adapters."""

from __future__ import annotations

from types import MappingProxyType

from evo_hpo.search.conformance import SearcherConformance
from evo_hpo.search.registry import available_searchers

OWN = tuple(n for n in available_searchers() if not n.startswith(("nevergrad:", "optuna:")))


class TestOwnSearchers(SearcherConformance):
    names = OWN


class TestFreshMinibatches(SearcherConformance):
    names = ("best_of_random", "dynamic_programming", "genetic", "greedy", "local_search", "simulated_annealing")
    settings = MappingProxyType({"minibatch": "fresh", "tokens": 32, "batch": 3})


class TestOneShotSettings(SearcherConformance):
    names = ("augmented_hessian", "delta_loss", "fisher", "gradient_threshold", "zeroq")
    settings = MappingProxyType({"share": 0.5, "most_tokens": 128})
    evaluations = 16


class TestOpponentsOnFreshMinibatches(SearcherConformance):
    names = ("layerwise", "measured_greedy", "quadratic_surrogate")
    settings = MappingProxyType({"minibatch": "fresh", "tokens": 32, "batch": 3})


class TestCautiousSettings(SearcherConformance):
    names = ("dynamic_programming", "integer_programming")
    settings = MappingProxyType({"changes": 3, "refine": False, "probe_levels": 2})


class TestTrustRegionOnAFixedMinibatch(SearcherConformance):
    names = ("trust_region",)
    settings = MappingProxyType({"minibatch": "fixed", "explore": 0.0, "batch": 4, "radius": 2})


class TestPairedAcceptance(SearcherConformance):
    names = ("evopress",)
    settings = MappingProxyType({"acceptance": "paired", "tokens": 32})


class TestThreeStages(SearcherConformance):
    names = ("multi_step:genetic", "multi_step:random", "multi_step:evopress")
    settings = MappingProxyType({"survivors": (3, 2, 1), "tokens": (8, 16, 64), "elitism": "count"})


class TestGreedyFromTheCheapest(SearcherConformance):
    names = ("greedy",)
    settings = MappingProxyType({"start": "cheapest", "lazy": 3, "patience": 2})


class TestLocalSearchRules(SearcherConformance):
    names = ("local_search",)
    settings = MappingProxyType({"improvement": "best", "groups": "size"})
