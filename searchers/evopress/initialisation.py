"""Where EvoPress starts: one point, or the best of several on few tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.budget import Allowance
from evo_hpo.search.registry import make_searcher
from evo_hpo.search.trial import Outcome, Trial
from evo_hpo.space.compression_space import Assignment, CompressionSpace

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = [
    "WARM_STARTS",
    "Initialisation",
    "WarmStart",
    "initialisation",
    "random_and_spent",
    "rounded_up_and_decremented",
]

WARM_STARTS = ("dynamic_programming", "trust_region")
"""Searchers whose recommendation may be the start."""

UNMEASURED = 4  # trials a unit of such a searcher where the budget, in seconds, gives no share of trials


class Initialisation:
    """Draws ``count`` starting points; asks for their losses only where there is a choice to make."""

    note = "initial"

    def __init__(self, space: CompressionSpace, draw: Callable[[], Assignment], count: int, tokens: int | None) -> None:
        self.space = space
        self.tokens = tokens
        self.best_number: int | None = None
        self.best_loss: float | None = None
        self._points = list(dict.fromkeys(draw() for _ in range(count)))
        self._best = self._points[0]
        self._waiting = len(self._points) > 1

    def ask(self, allowance: Allowance) -> tuple[Assignment, ...]:
        """The points to score, as one batch; () when the start is decided."""
        if not self._waiting:
            return ()
        self._waiting = False
        return tuple(self._points[: max(1, allowance.affords(len(self._points), self.tokens))])

    def tell(self, outcomes: Sequence[Outcome], sign: float) -> None:
        """Keeps the best."""
        best = math.inf
        for outcome in outcomes:
            if outcome.usable and sign * outcome.loss < best:
                best = sign * outcome.loss
                self._best, self.best_number, self.best_loss = outcome.trial.levels, outcome.trial.number, best

    def best(self) -> Assignment:
        """The starting point."""
        return self._best


class WarmStart:
    """Runs another searcher on a share of the budget; what it recommends is the start.

    Args:
        name: of the searcher.
        tokens: calibration tokens of its trials.
        share: of what is left when it is first asked; under a budget of seconds, 4 trials a unit instead.
    """

    def __init__(self, name: str, space: CompressionSpace, *, tokens: int | None, share: float, seed: int) -> None:
        self.searcher = make_searcher(name, space, seed=seed, tokens=tokens)
        self.space = space
        self.share = share
        self.asked = 0
        self._numbers: dict[Assignment, int] = {}
        self._reserve: Allowance | None = None

    def ask(self, allowance: Allowance) -> tuple[Trial, ...]:
        """The searcher's next batch within its share; () when that is spent or it has nothing more to ask."""
        if self._reserve is None:
            self._reserve = Allowance(
                None if allowance.tokens is None else int(allowance.tokens * (1 - self.share)),
                None if allowance.evaluations is None else int(allowance.evaluations * (1 - self.share)),
                allowance.default_tokens,
            )
        left = Allowance(
            None if allowance.tokens is None else allowance.tokens - (self._reserve.tokens or 0),
            None if allowance.evaluations is None else allowance.evaluations - (self._reserve.evaluations or 0),
            allowance.default_tokens,
        )
        if left.tokens is None and left.evaluations is None:
            left = Allowance(None, UNMEASURED * len(self.space) - self.asked, allowance.default_tokens)
        if (left.tokens is not None and left.tokens <= 0) or (left.evaluations is not None and left.evaluations <= 0):
            return ()
        trials = self.searcher.ask(left)
        trials = trials[: left.affords(len(trials), trials[0].tokens)] if trials else ()
        self.asked += len(trials)
        return trials

    def tell(self, outcomes: Sequence[Outcome], sign: float) -> None:
        """Passes on what was scored, losses times ``sign``."""
        for outcome in outcomes:
            self._numbers.setdefault(outcome.trial.levels, outcome.trial.number)
        self.searcher.tell([o if sign > 0 or not o.usable else replace(o, loss=sign * o.loss) for o in outcomes])

    def best(self) -> Assignment:
        """What the searcher recommends; uniform compression before it recommends anything."""
        return self.searcher.recommend() or self.space.uniform()

    @property
    def best_number(self) -> int | None:
        """Number of the first trial of the best; None: it was not scored."""
        return self._numbers.get(self.best())


def initialisation(rule: str, space: CompressionSpace, *, count: int, tokens: int | None, seed: int) -> Initialisation:
    """The start that a rule names: ``uniform``, ``decremented`` or ``random``.

    Raises:
        InvalidSettingError: another rule.
    """
    rng = np.random.default_rng([seed, 1])
    if rule == "uniform":
        return Initialisation(space, space.uniform, 1, tokens)
    if rule == "decremented":
        return Initialisation(space, lambda: rounded_up_and_decremented(space, rng), count, tokens)
    if rule == "random":
        return Initialisation(space, lambda: random_and_spent(space, rng), count, tokens)
    raise InvalidSettingError(f"init={rule!r} must be one of: uniform, decremented, random, {', '.join(WARM_STARTS)}")


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
