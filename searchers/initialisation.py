"""Where EvoPress starts: one point, or the best of several on few tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from evo_hpo.budget import Allowance
from evo_hpo.errors import InvalidSettingError
from evo_hpo.space import Assignment, CompressionSpace
from evo_hpo.trial import Outcome

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["Initialisation", "initialisation", "rounded_up_and_decremented"]


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
        return Initialisation(space, lambda: space.sample(rng), count, tokens)
    raise InvalidSettingError(f"init={rule!r} must be one of: uniform, decremented, random")


def rounded_up_and_decremented(space: CompressionSpace, rng: Generator) -> Assignment:
    """The least uniform assignment at or above the budget, then random steps down until the budget holds."""
    levels = list(space.highest)
    for k in range(max(space.highest) + 1):
        shared = [min(max(k, low), high) for low, high in zip(space.lowest, space.highest, strict=True)]
        if space.cost(shared) >= space.budget:
            levels = shared
            break
    while space.cost(levels) > space.budget:
        able = [i for i, level in enumerate(levels) if level > space.lowest[i]]
        levels[able[int(rng.integers(len(able)))]] -= 1
    return tuple(levels) if space.feasible(levels) else space.repair(levels, rng, fill=True)
