"""Where EvoPress starts: one point, or the best of several on few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from evo_hpo.search.budget import Allowance
from evo_hpo.search.procedure import Procedure, Steps
from evo_hpo.search.registry import make_searcher
from evo_hpo.search.searcher import Searcher
from evo_hpo.search.trial import Batch, Outcome
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.evopress.settings import WARM_STARTS, Settings

if TYPE_CHECKING:
    from numpy.random import Generator

MOST_OF_A_START = 8192  # tokens that `fisher` reads for one, however large the share: the rest is for the search

UNMEASURED = 4  # trials a unit of such a searcher where the budget, in seconds, gives no share of trials


class Start:
    """One point, or the best of several, which are scored only where there is a choice to make.

    Attributes:
        tokens: calibration tokens of a starting point; None: the problem's default.
        chosen: the outcome that decided; None: none did.
    """

    def __init__(self, points: Sequence[Assignment], tokens: int | None) -> None:
        self.points = points
        self.tokens = tokens
        self.chosen: Outcome | None = None

    def steps(self, owner: Procedure) -> Steps[list[Outcome]]:
        """Scores the points, as one batch of the owner's."""
        if len(self.points) == 1:
            return []
        outcomes: list[Outcome] = yield owner.propose(self.points, note="initial", tokens=self.tokens)
        self.chosen = min((o for o in outcomes if o.usable), key=lambda o: o.loss, default=None)
        return outcomes

    def best(self) -> Assignment:
        """The starting point."""
        return self.points[0] if self.chosen is None else self.chosen.trial.levels

    @property
    def number(self) -> int | None:
        """Number of the best's first trial; None: it was not scored."""
        return None if self.chosen is None else self.chosen.trial.number


class WarmStart(Start):
    """What another searcher recommends after a share of the budget (under one of seconds, after 4 trials a unit)."""

    def __init__(self, searcher: Searcher, tokens: int | None, share: float) -> None:
        super().__init__((searcher.space.uniform(),), tokens)
        self.searcher = searcher
        self.share = share
        self._numbers: dict[Assignment, int] = {}

    def steps(self, owner: Procedure) -> Steps[list[Outcome]]:
        """The searcher's batches, within its share of what is left to the owner at first."""
        most = UNMEASURED * len(owner.space)
        first, told = owner.allowance, list[Outcome]()
        spared = Allowance(
            None if first.tokens is None else int(first.tokens * (1 - self.share)),
            None if first.evaluations is None else int(first.evaluations * (1 - self.share)),
        )
        while (left := _without(owner.allowance, spared, most - len(told))).affords(1, 1):
            batch = self.searcher.ask(left)
            affordable = left.affords(len(batch), batch.tokens) if batch else 0
            if batch is None or not affordable:
                break
            trials = tuple([owner.trial(t.levels, t.parent, t.note) for t in batch.trials[:affordable]])
            outcomes = yield Batch(trials, batch.terms)
            for outcome in outcomes:
                self._numbers.setdefault(outcome.trial.levels, outcome.trial.number)
            self.searcher.tell(outcomes)
            told += outcomes
            yield None
        return told

    def best(self) -> Assignment:
        """What the searcher recommends; uniform compression before it recommends anything."""
        return self.searcher.recommend() or super().best()

    @property
    def number(self) -> int | None:
        return self._numbers.get(self.best())


class FisherStart(WarmStart):
    """The solution of the searcher ``fisher``, not scored on its own: sensitivities are all that is charged."""

    def steps(self, owner: Procedure) -> Steps[list[Outcome]]:
        """One probe within the share, in multiples of a starting point's tokens."""
        left, each = owner.allowance, self.tokens or owner.allowance.default_tokens
        own = 1 - self.share
        spared = Allowance(
            None if left.tokens is None else int(left.tokens * own) - each,  # a trial more, which is not asked for
            None if left.evaluations is None else int(left.evaluations * own) - 1,
        )
        probe = self.searcher.next_probe(replace(_without(left, spared, UNMEASURED), default_tokens=each))
        if probe is not None:
            self.searcher.learn_sensitivities((yield from owner.sensitivities(probe)))
        return []


def _without(allowance: Allowance, spared: Allowance, most: int) -> Allowance:
    """What is left without what is spared; ``most`` trials where neither tokens nor trials are limited."""
    tokens = None if allowance.tokens is None else allowance.tokens - (spared.tokens or 0)
    evaluations = None if allowance.evaluations is None else allowance.evaluations - (spared.evaluations or 0)
    if tokens is None and evaluations is None:
        evaluations = most
    return replace(allowance, tokens=tokens, evaluations=evaluations)


def initialisation(space: CompressionSpace, settings: Settings, seed: int) -> Start:
    """The start that the settings name."""
    rule, tokens = settings.init, settings.initial_tokens or settings.selection.stages[0].tokens
    if rule == "fisher":
        fisher = make_searcher(rule, space, seed=seed, most_tokens=MOST_OF_A_START)
        return FisherStart(fisher, tokens, settings.initial_share)
    if rule in WARM_STARTS:
        return WarmStart(make_searcher(rule, space, seed=seed, tokens=tokens), tokens, settings.initial_share)
    rng = np.random.default_rng([seed, 1])
    if rule == "uniform":
        return Start((space.uniform(),), tokens)
    draw = rounded_up_and_decremented if rule == "decremented" else random_and_spent
    return Start(tuple(dict.fromkeys(draw(space, rng) for _ in range(settings.initial))), tokens)


def random_and_spent(space: CompressionSpace, rng: Generator) -> Assignment:
    """A uniform draw, then random steps up while the budget pays for any: switches never spend what a start leaves."""
    cursor = space.knapsack.cursor(space.sample(rng))
    while able := [i for i in space.knapsack.free if cursor.allows(i, +1)]:
        for i in rng.permutation(able).tolist():
            if cursor.allows(i, +1):
                cursor.step(i)
    return tuple(cursor.levels)


def rounded_up_and_decremented(space: CompressionSpace, rng: Generator) -> Assignment:
    """The least uniform assignment at or above the budget, then random steps down until the budget holds.

    Where a uniform assignment leaves less than any step costs, it is that one.
    """
    levels = list(space.highest)
    for k in range(max(space.highest) + 1):
        shared = [min(max(k, low), high) for low, high in zip(space.lowest, space.highest, strict=True)]
        if space.slack(shared) < space.knapsack.least_step:
            levels = shared
            break
    cursor = space.knapsack.cursor(levels)
    while cursor.slack < 0:
        able = [i for i in space.knapsack.free if cursor.can(i, -1)]
        cursor.step(able[int(rng.integers(len(able)))], -1)
    return cursor.assignment() or space.repair(cursor.levels, rng, fill=True)
