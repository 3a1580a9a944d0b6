"""The purse that every searcher is charged from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evo_hpo.errors import BudgetError

KINDS = {"tokens": "calibration tokens spent", "evaluations": "trials scored", "seconds": "seconds of scoring"}
"""What a budget may be of, and how the axis of a curve over it is labelled."""


@dataclass(frozen=True)
class Budget:
    """What one search may spend: exactly one of tokens read by the model, evaluations (trials), or seconds of scoring.

    Raises:
        BudgetError: none or several are given, or the amount is not positive.
    """

    tokens: int | None = None
    evaluations: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            raise BudgetError(
                f"a budget is exactly one of tokens, evaluations or seconds, got {', '.join(given) or 'none'}"
            )
        ((kind, amount),) = given.items()
        if isinstance(amount, bool) or not amount > 0 or (kind == "seconds" and amount == math.inf):
            raise BudgetError(f"budget of {amount!r} {kind} must be positive, and finite")
        if kind != "seconds":
            if not math.isfinite(amount) or amount != int(amount):
                raise BudgetError(f"budget of {amount!r} {kind} must be a whole number")
            object.__setattr__(self, kind, int(amount))

    @property
    def kind(self) -> str:
        """One of ``KINDS``."""
        return next(k for k, v in vars(self).items() if v is not None)

    @property
    def amount(self) -> float:
        """How much of it."""
        return float(getattr(self, self.kind))


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left to spend when a searcher is asked: it should ask for no more (the loop drops what it cannot pay).

    Attributes:
        tokens: calibration tokens left; None: tokens are not what is limited.
        evaluations: trials left; None: trials are not what is limited.
        default_tokens: what a trial costs that names no tokens of its own; 0: the problem has no fidelity.
        pool_tokens: of all the text that minibatches are drawn from; 0: not known.
    """

    tokens: int | None = None
    evaluations: int | None = None
    default_tokens: int = 0
    pool_tokens: int = 0

    def affords(self, trials: int, tokens: int | None = None) -> int:
        """How many of ``trials`` trials of ``tokens`` tokens each can be paid."""
        if self.evaluations is not None:
            trials = min(trials, self.evaluations)
        if self.tokens is not None:
            each = self.default_tokens if tokens is None else tokens
            trials = min(trials, self.tokens // each) if each else trials
        return max(trials, 0)

    def less(self, trials: int, tokens: int | None = None) -> Allowance:
        """What is left after ``trials`` trials of ``tokens`` tokens each."""
        each = self.default_tokens if tokens is None else tokens
        return replace(
            self,
            tokens=None if self.tokens is None else self.tokens - trials * each,
            evaluations=None if self.evaluations is None else self.evaluations - trials,
        )


class Ledger:
    """Running account of one search."""

    def __init__(self, budget: Budget, default_tokens: int = 0, pool_tokens: int = 0) -> None:
        self.budget = budget
        self.default_tokens, self.pool_tokens = default_tokens, pool_tokens
        self.tokens = 0
        self.evaluations = 0
        self.seconds = 0.0
        if budget.tokens is not None and not default_tokens:
            raise BudgetError("a budget of tokens needs a problem that reads tokens: give evaluations or seconds")

    @property
    def spent(self) -> float:
        """How much of the budget's kind is spent."""
        return float(getattr(self, self.budget.kind))

    @property
    def exhausted(self) -> bool:
        """True when nothing is left."""
        return self.spent >= self.budget.amount

    def allowance(self) -> Allowance:
        """What is left; seconds limit no single batch, they are looked at between batches."""
        return Allowance(
            None if self.budget.tokens is None else self.budget.tokens - self.tokens,
            None if self.budget.evaluations is None else self.budget.evaluations - self.evaluations,
            self.default_tokens,
            self.pool_tokens,
        )

    def charge(self, tokens: Sequence[int], seconds: float) -> None:
        """Books a batch: the tokens that each of its trials read, and the seconds of all."""
        self.tokens += sum(tokens)
        self.evaluations += len(tokens)
        self.seconds += seconds
