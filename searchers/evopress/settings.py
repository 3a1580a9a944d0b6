"""EvoPress's settings, and the published ones by application (arXiv 2410.14649, appendix)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.searcher import MANY, boolean, one_of, positive, probability
from evo_hpo.space.compression_space import CompressionSpace
from searchers.evopress.selection import Selection

DEPTH_RULE = "k(n-k)/1.5"  # generations, where k of n units are dropped
WARM_STARTS = ("dynamic_programming", "fisher", "trust_region")  # searchers whose recommendation may be the start
UNDRAWN = ("uniform", *WARM_STARTS)  # starts that are one point


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What of EvoPress can be set; the defaults are those of a single-stage search for problems without fidelity.

    Args:
        offspring: lambda, distinct mutants of a generation.
        survivors: how many each stage keeps; the last entry is the population (mu).
        tokens: calibration tokens of each stage; None: the problem's default.
        generations: stop after so many; None: when the budget is spent.
        switch_rule: switches an offspring takes: ``min_of_two`` draws from 1..max_switches, or ``fixed``.
        max_switches: see ``switch_rule``.
        group: a switch stays within units of equal ``size``, of equal ``name`` (role), or ``none`` (anywhere).
        cross_group: probability that an offspring exchanges budget across groups; 0 is the published search.
        init: ``uniform``, ``decremented`` (rounded up, then random decrements), ``random``, or what another searcher
            recommends after ``initial_share`` of the budget: ``dynamic_programming``, ``trust_region``, or ``fisher``
            (which spends the share on sensitivities).
        initial: starting points drawn, of which the best on ``initial_tokens`` is taken.
        initial_tokens: calibration tokens of a starting point; None: the first stage's.
        initial_share: share of the budget for a start by another searcher; its trials are charged like all others.
        elitism: parents join the last stage by ``index``, stages by survivor ``count`` (reference), or ``none``.
        minibatch: ``fresh`` for every stage; ``nested`` (a stage's data contains the one before's); ``fixed``.
        widen_after: generations without a new best parent after which the number of switches has a heavy tail (power
            law) until there is one; None: never.
        restart_after: generations without a new best parent after which the search starts anew, or sooner where no
            mutant is left to measure; None: never.
        revisit: let an offspring be an assignment tried before, as published; False: not where its loss is exact (a
            problem without fidelity, or ``minibatch="fixed"``) and would only be read once more.
        invert: look for the worst assignment instead.
        acceptance: ``loss``, as published: the least loss of the last stage is the next parent; ``paired``: offspring
            replace it only where they are better sequence by sequence, beyond the error of the difference.
        doubt: p-value of the one-sided paired test below which ``paired`` accepts; 0.16 is about one standard error.
        minibatches: like the last stage's that ``paired`` may read to decide; it stops as soon as it is decided.

    Raises:
        InvalidSettingError: a setting is outside its range, or two do not go together.
    """

    offspring: int = 4
    survivors: Sequence[int] = (1,)
    tokens: Sequence[int] | int | None = None
    generations: int | str | None = None
    switch_rule: str = "min_of_two"
    max_switches: int = 3
    group: str = "size"
    cross_group: float = 0.5
    init: str = "uniform"
    initial: int = 1
    initial_tokens: int | None = None
    initial_share: float = 0.5
    elitism: str = "index"
    minibatch: str = "fresh"
    widen_after: int | None = None
    restart_after: int | None = None
    revisit: bool = False
    invert: bool = False
    acceptance: str = "loss"
    doubt: float = 0.16
    minibatches: int = 4

    def __post_init__(self) -> None:
        for name in ("offspring", "minibatches", "max_switches", "initial"):
            positive(name, getattr(self, name), most=MANY if name in ("max_switches", "initial") else math.inf)
        for name in ("initial_tokens", "widen_after", "restart_after", "generations"):
            value = getattr(self, name)
            if value is not None and not (name == "generations" and value == DEPTH_RULE):
                positive(name, value)
        one_of("init", self.init, "decremented", "random", *UNDRAWN)
        one_of("minibatch", self.minibatch, "fresh", "nested", "fixed")
        one_of("acceptance", self.acceptance, "loss", "paired")
        boolean("revisit", self.revisit)
        boolean("invert", self.invert)
        if not 0 < probability("initial_share", self.initial_share) < 1:
            raise InvalidSettingError(
                f"initial_share={self.initial_share!r} must be a share of the budget, above 0, below 1"
            )
        if not 0 < probability("doubt", self.doubt) <= 0.5:
            raise InvalidSettingError(f"doubt={self.doubt!r} must be above 0 and at most 0.5")
        if self.initial != 1 and self.init in UNDRAWN:
            raise InvalidSettingError(
                f"initial={self.initial!r} needs a start that is drawn: init='random' or 'decremented', not {self.init}"
            )
        if self.elitism == "none" and not (self.widen_after is None and self.restart_after is None):
            raise InvalidSettingError(
                "widen_after and restart_after wait for generations without a new best parent; elitism='none' makes "
                "a new parent of each: leave them out, or let parents join (elitism='index' or 'count')"
            )
        against = {
            "elitism": self.elitism == "none",
            "minibatch": self.minibatch == "fixed",
            "restart_after": self.restart_after is not None,
            "survivors": self.selection.population > 1,
        }
        for name in filter(against.get, against if self.acceptance == "paired" else ()):
            raise InvalidSettingError(
                f"acceptance='paired' compares one parent with one offspring on ever new text: change {name}"
            )

    @cached_property
    def selection(self) -> Selection:
        """The stages."""
        return Selection.of(self.survivors, self.tokens, self.elitism)

    def most_generations(self, space: CompressionSpace) -> float:
        """The most generations; the rule of depth pruning drops k of n units in the group where that takes longest."""
        if not isinstance(self.generations, str):
            return math.inf if self.generations is None else self.generations
        if not space.two_levels:
            return math.inf  # a rule for units that are dropped or kept
        start, most = space.uniform(), 1
        for members in space.groups().values():
            dropped = sum(start[i] == space.lowest[i] for i in members)
            most = max(most, math.ceil(dropped * (len(members) - dropped) / 1.5))
        return most


_ROUNDED_UP = Settings(cross_group=0.0, revisit=True, init="decremented", initial=32, generations=400)
"""From the uniform assignment itself where the target is one level."""

PRESETS = {
    "plain": Settings(),
    "depth_pruning": Settings(
        generations=DEPTH_RULE,
        offspring=32,
        survivors=(2, 1),
        tokens=(2048, 32768),
        cross_group=0.0,
        init="random",
        initial=64,
        initial_tokens=2048,
        revisit=True,
    ),
    "sparsity": replace(_ROUNDED_UP, offspring=64, survivors=(8, 2, 1), tokens=(2048, 16384, 65536)),
    "quantization": replace(
        _ROUNDED_UP, offspring=128, survivors=(16, 4, 1), tokens=(2048, 16384, 131072), generations=150
    ),
    "super_fast": replace(_ROUNDED_UP, offspring=16, survivors=(1, 1), tokens=(512, 8192)),
}
"""Published settings by application; ``plain`` is none of them."""


def resolved(preset: str, given: Mapping[str, Any]) -> Settings:
    """The settings of a preset, with those that are given and not None in their place.

    Raises:
        InvalidSettingError: no such preset, or settings that make no sense.
    """
    base = PRESETS[one_of("preset", preset, *PRESETS)]
    chosen = {key: value for key, value in given.items() if value is not None}
    if chosen.get("init") in UNDRAWN:
        base = replace(base, initial=1)
    return replace(base, **chosen)
