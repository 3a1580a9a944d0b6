"""What is measured: searchers and encodings by label, and suites of synthetic problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

__all__ = ["ENCODED", "EQUAL", "HITS", "LINEUP", "SUITES", "Named", "Suite"]

Named = dict[str, tuple[str, dict[str, Any]]]
"""Label -> name and settings."""

LINEUP: Named = {
    "uniform": ("uniform", {}),
    "random": ("random", {}),
    "best_of_random": ("best_of_random", {}),
    "local_search": ("local_search", {}),
    "simulated_annealing": ("simulated_annealing", {}),
    "genetic": ("genetic", {}),
    "greedy": ("greedy", {}),
    "dynamic_programming": ("dynamic_programming", {}),
    "dynamic_programming, one solution": ("dynamic_programming", {"refine": False}),
    "integer_programming": ("integer_programming", {}),
    "trust_region": ("trust_region", {}),
    "evopress": ("evopress", {}),
    "evopress, within groups": ("evopress", {"cross_group": 0.0}),
    "evopress, lambda 1": ("evopress", {"offspring": 1}),
    "evopress, lambda 16": ("evopress", {"offspring": 16}),
    "evopress, as published": ("evopress", {"offspring": 16, "revisit": True, "cross_group": 0.0}),
    "evopress, wider": ("evopress", {"widen_after": 3}),
    "evopress, restarts": ("evopress", {"widen_after": 3, "restart_after": 60}),
    "evopress, lambda 1, restarts": ("evopress", {"offspring": 1, "widen_after": 10, "restart_after": 120}),
    "evopress, population 4": ("evopress", {"survivors": (4,)}),
    "evopress from dynamic_programming": ("evopress", {"init": "dynamic_programming"}),
    "evopress from trust_region": ("evopress", {"init": "trust_region"}),
    "multi_step:random": ("multi_step:random", {}),
    "optuna:cmaes": ("optuna:cmaes", {}),
    "optuna:nsga2": ("optuna:nsga2", {}),
    "optuna:qmc": ("optuna:qmc", {}),
    "optuna:random": ("optuna:random", {}),
    "nevergrad:DiscreteOnePlusOne": ("nevergrad:DiscreteOnePlusOne", {}),
    "nevergrad:DiscreteLenglerOnePlusOne": ("nevergrad:DiscreteLenglerOnePlusOne", {}),
    "nevergrad:CMA": ("nevergrad:CMA", {}),
    "nevergrad:NGOpt": ("nevergrad:NGOpt", {}),
    "optuna:tpe": ("optuna:tpe", {}),
}
"""Searchers; those of other libraries with their default encodings."""

_BOTH = ("repaired", "projection", "native", "keys", "penalty")
ENCODED: Named = {
    f"{searcher} / {encoding}": (searcher, {"encoding": encoding})
    for searcher, encodings in {
        "nevergrad:DiscreteOnePlusOne": _BOTH,
        "nevergrad:DiscreteLenglerOnePlusOne": _BOTH,
        "nevergrad:CMA": _BOTH,
        "nevergrad:NGOpt": _BOTH,
        "nevergrad:TwoPointsDE": _BOTH,
        "optuna:cmaes": (*_BOTH, "set_constraint"),
        "optuna:nsga2": (*_BOTH, "set_constraint"),
        "optuna:tpe": (*_BOTH, "set_constraint", "sequential"),
    }.items()
    for encoding in encodings
}
"""Optimizers of other libraries under every encoding."""

_KINDS = (
    "CSEC10",
    "DE",
    "DiagonalCMA",
    "DoubleFastGADiscreteOnePlusOne",
    "LognormalDiscreteOnePlusOne",
    "NgDS2",
    "NgIoh",
    "NgIoh21",
    "OnePlusOne",
    "Portfolio",
    "PortfolioDiscreteOnePlusOne",
    "PSO",
    "TBPSA",
)
FAMILIES: Named = {
    f"{searcher} / {encoding}": (searcher, {"encoding": encoding})
    for searcher in (*(f"nevergrad:{optimizer}" for optimizer in _KINDS), "optuna:tpe_univariate")
    for encoding in _BOTH
}
"""One of each further kind of Nevergrad's optimizers, and TPE unit by unit, for their default encodings."""

_SLOW = ("BO", "BOSplit")


@cache
def every_nevergrad() -> Named:
    """Every optimizer of Nevergrad that can work here, under every encoding; not those that take seconds a trial."""
    from searchers.foreign.nevergrad_adapter import family

    names = [f"nevergrad:{name}" for name in family.members() if name not in _SLOW]
    return {f"{name} / {e}": (name, {"encoding": e}) for name in names for e in _BOTH}


_DROP = {"levels": 2, "exact": True}
HITS: Named = {
    "8008, 0.1": ("interacting", {"units": 16, "tightness": 0.375, "interaction": 0.1, **_DROP}),
    "8008, 0.35": ("interacting", {"units": 16, "tightness": 0.375, "interaction": 0.35, **_DROP}),
    "125970, 0.1": ("interacting", {"units": 20, "tightness": 0.4, "interaction": 0.1, **_DROP}),
    "125970, 0.35": ("interacting", {"units": 20, "tightness": 0.4, "interaction": 0.35, **_DROP}),
}
"""Dropping 6 of 16 and 8 of 20 modules: number of assignments, standard deviation of the pairwise terms."""

_BUDGETS = {"tight": 0.8, "loose": 0.4}  # share of the range of costs that the budget does not pay
EQUAL: Named = {
    f"{kind} {units} {budget}": (kind, {"units": units, "tightness": tightness})
    for kind in ("additive", "interacting", "non_monotone")
    for units in (30, 60, 210)
    for budget, tightness in _BUDGETS.items()
} | {
    "unequal 60 tight": ("interacting", {"units": 60, "unequal": True, "tightness": 0.8}),
    "unequal 60 loose": ("interacting", {"units": 60, "unequal": True, "tightness": 0.4}),
    "unequal 210 loose": ("interacting", {"units": 210, "unequal": True, "tightness": 0.4, "interaction": 0.05}),
    "noisy 60": ("noisy", {"units": 60, "noise": 0.3}),
}
"""Five levels; pairwise terms of standard deviation 0.1 (interacting) and 0.05 (non-monotone) unless said otherwise."""

ROLES: Named = {
    f"roles 60 {budget}": ("interacting", {"units": 60, "unequal": True, "structure": 1.0, "tightness": tightness})
    for budget, tightness in _BUDGETS.items()
}
"""Units of unequal size whose sensitivity goes with their role and block, so that sizes want different shares."""

_FEW_PROBLEMS = ("interacting 30 loose", "non_monotone 60 loose", "interacting 60 tight")

_SWEPT = ("interacting 30 loose", "non_monotone 30 tight")

_WEAK = ("nevergrad:TwoPointsDE", "optuna:nsga2", "optuna:tpe")
_STRONGEST: Named = {
    label: named
    for label, named in (LINEUP | ENCODED).items()
    if label.startswith(("evopress", "trust_region", "uniform")) or (" / " in label and not label.startswith(_WEAK))
}

_BESIDE_GP = (
    "uniform",
    "random",
    "local_search",
    "trust_region",
    "evopress",
    "evopress, lambda 1",
    "optuna:cmaes",
    "optuna:tpe",
    "nevergrad:DiscreteOnePlusOne",
    "nevergrad:DiscreteLenglerOnePlusOne",
    "nevergrad:CMA",
    "nevergrad:NGOpt",
)
_GP: Named = {
    f"optuna:gp / {encoding}": ("optuna:gp", {"encoding": encoding}) for encoding in (*_BOTH, "set_constraint")
}

_OTHERS = ("optuna:", "nevergrad:")
_OURS: Named = {label: named for label, named in LINEUP.items() if not label.startswith(_OTHERS)}


@dataclass(frozen=True)
class Suite:
    """Searchers x problems x seeds on equal evaluations.

    Args:
        problems: label -> problem and settings.
        lineup: label -> searcher and settings, or what finds them out.
        evaluations: of each run.
        seeds: runs of each searcher on each problem; every seed is another instance.
        few: fewer seeds for searchers that are slow: start of the label -> seeds.
    """

    problems: Named
    lineup: Named | Callable[[], Named]
    evaluations: int
    seeds: int
    few: tuple[tuple[str, int], ...] = ()

    @property
    def searchers(self) -> Named:
        """Label -> searcher and settings."""
        return self.lineup() if callable(self.lineup) else self.lineup

    def seeds_of(self, label: str) -> int:
        """How many seeds this searcher gets; the first entry that fits holds."""
        return min(self.seeds, next((n for start, n in self.few if label.startswith(start)), self.seeds))


SUITES: dict[str, Suite] = {
    "hits": Suite(HITS, LINEUP, 800, 20, (("optuna", 10), ("nevergrad", 10))),
    "equal": Suite(
        EQUAL,
        _OURS | {label: LINEUP[label] for label in ("optuna:qmc", "optuna:random")} | ENCODED,
        200,
        10,
    ),
    "two_levels": Suite(
        {name: HITS[name] for name in ("8008, 0.35", "125970, 0.1")},
        {label: LINEUP[label] for label in ("uniform", "random", "evopress", "trust_region")}
        | ENCODED
        | _GP
        | {label: named for label, named in FAMILIES.items() if label.startswith("optuna:")},
        200,
        10,
    ),
    "families": Suite({name: EQUAL[name] for name in _FEW_PROBLEMS}, FAMILIES, 200, 10),
    "nevergrad": Suite({name: EQUAL[name] for name in _SWEPT}, every_nevergrad, 200, 3),
    "gp": Suite(EQUAL, _GP | {label: LINEUP[label] for label in _BESIDE_GP}, 40, 10),
    "unequal": Suite({n: EQUAL[n] for n in EQUAL if n.startswith("unequal 60")} | ROLES, _STRONGEST, 1000, 10),
}
"""Equal: 200 evaluations are what a live search on a language model affords; 800 are the bar of the small spaces; 40
are what Optuna's GP affords, at one to three seconds a trial."""
