"""The one loop: ask, charge, score, tell, and now and then look at held-out data."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from evo_hpo.errors import BudgetError, InfeasibleError, InvalidSettingError
from evo_hpo.search.budget import Budget, Ledger
from evo_hpo.search.problem import Minibatch, Problem, Score
from evo_hpo.search.searcher import Searcher
from evo_hpo.search.trial import Outcome, Trial
from evo_hpo.space.compression_space import Assignment

__all__ = ["Checkpoint", "Observer", "Recorder", "SearchResult", "search"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Held-out figures of the incumbent at one moment of a search.

    Attributes:
        fraction: of the budget, 0 to 1, at which it was due; 1 is the final one.
        tokens, evaluations, seconds: spent when it was taken (seconds: scoring only).
        levels: the incumbent.
        held_out: figures from ``Problem.validate``; ``loss`` is lower-is-better.
    """

    fraction: float
    tokens: int
    evaluations: int
    seconds: float
    levels: Assignment
    held_out: dict[str, float]


@dataclass
class SearchResult:
    """Everything a search found.

    Attributes:
        best: the searcher's recommendation, feasible; None when every trial failed.
        best_loss: least calibration loss that ``best`` got (lower is better); compare searches by held-out data.
        outcomes: every trial, in order.
        checkpoints: held-out figures along the budget.
        ledger: what was spent.
        seconds: wall-clock of the whole loop; ``searcher_seconds``: of it, inside ask and tell.
        stop_reason: why the search ended.
        scoring: what the problem says about how it scored, see :meth:`evo_hpo.search.problem.Problem.report`.
    """

    best: Assignment | None = None
    best_loss: float = math.inf
    outcomes: list[Outcome] = field(default_factory=list, repr=False)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    ledger: Ledger | None = None
    seconds: float = 0.0
    searcher_seconds: float = 0.0
    stop_reason: str = ""
    scoring: dict[str, Any] = field(default_factory=dict)


class Observer(Protocol):
    """Watches a search; must not change it. Called in the loop's thread, so it must be quick."""

    def batch(self, outcomes: Sequence[Outcome], ledger: Ledger) -> None:
        """A batch was scored and told."""

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Held-out figures of the incumbent were taken."""


class Recorder(Protocol):
    """Keeps what was paid for, and gives it back on resume. Implemented by :class:`evo_hpo.record.journal.Journal`."""

    def recall(self, trials: Sequence[Trial], minibatch: Minibatch) -> list[Outcome]:
        """Recorded outcomes of the first trials of this batch (all, some or none), in order.

        Raises:
            JournalError: the journal holds other trials at this point.
        """

    def recall_checkpoint(self, fraction: float, levels: Assignment) -> Checkpoint | None:
        """The recorded checkpoint of this fraction and incumbent, if any."""

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """Keeps new outcomes durably before they are told."""

    def record_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Keeps a new checkpoint durably."""

    def finish(self, result: SearchResult) -> None:
        """The search ended by itself."""


def search(
    searcher: Searcher,
    problem: Problem,
    *,
    budget: Budget,
    seed: int = 0,
    journal: Recorder | None = None,
    observers: Iterable[Observer] = (),
    checkpoints: Sequence[float] = (),
) -> SearchResult:
    """Runs a searcher on a problem until its budget is spent or it has nothing more to ask.

    Args:
        searcher: asks and is told; its own seed is independent of ``seed``.
        problem: scores.
        budget: what may be spent. A trial that cannot be paid in full is never started.
        seed: of the minibatches; give every searcher of a comparison the same.
        journal: keeps outcomes durably; outcomes it holds already are replayed instead of scored.
        observers: see :class:`Observer`.
        checkpoints: fractions of the budget (0 < f <= 1) at which the incumbent is validated on held-out data,
            outside the budget.

    Raises:
        BudgetError: the budget does not pay for the first batch, or a checkpoint is no fraction of it.
        InfeasibleError: the searcher asked for an assignment outside the space.
        JournalError: the journal belongs to another search.
    """
    if not isinstance(budget, Budget):
        raise BudgetError(f"budget={budget!r} must be a Budget, for example Budget(evaluations=300)")
    for fraction in checkpoints:
        if not 0 < fraction <= 1:
            raise BudgetError(f"checkpoint {fraction!r} must be a fraction of the budget, above 0 and at most 1")
    ledger = Ledger(budget, problem.tokens)
    draws = np.random.default_rng([seed, 0x6D62])
    fixed = last = int(draws.integers(2**31))
    due = sorted(checkpoints)
    result = SearchResult(ledger=ledger)
    watchers = tuple(observers)
    losses: dict[Assignment, float] = {}
    start = time.perf_counter()

    def take_checkpoints(spent: float) -> None:
        while due and spent >= due[0] - 1e-12:
            fraction = due.pop(0)
            levels = searcher.recommend()
            if levels is None:
                continue
            known = journal.recall_checkpoint(fraction, levels) if journal else None
            if known is None:
                figures = problem.validate(levels)
                known = Checkpoint(fraction, ledger.tokens, ledger.evaluations, ledger.seconds, levels, figures)
                if journal:
                    journal.record_checkpoint(known)
            result.checkpoints.append(known)
            for watcher in watchers:
                watcher.checkpoint(known)

    while not ledger.exhausted:
        allowance = ledger.allowance()
        before = time.perf_counter()
        trials = searcher.ask(allowance)
        result.searcher_seconds += time.perf_counter() - before
        if not trials:
            result.stop_reason = searcher.stop_reason or "the searcher has nothing more to ask"
            break
        for trial in trials:
            if not isinstance(trial, Trial):
                raise InvalidSettingError(f"ask returned {trial!r}: return trials, made by self.trial(levels)")
        affordable = allowance.affords(len(trials), trials[0].tokens)
        if not affordable:
            if not result.outcomes:
                raise BudgetError(
                    f"a budget of {budget.amount:g} {budget.kind} does not pay for one trial of "
                    f"{trials[0].tokens or problem.tokens} tokens: raise it or score on fewer tokens"
                )
            result.stop_reason = "the budget does not pay for another trial"
            break
        trials = trials[:affordable]
        _check(trials, problem)
        if trials[0].minibatch == "fresh":
            last = int(draws.integers(2**31))
        minibatch_seed = fixed if trials[0].minibatch == "fixed" else last
        minibatch = Minibatch(minibatch_seed, problem.tokens if trials[0].tokens is None else trials[0].tokens)
        outcomes = journal.recall(trials, minibatch) if journal else []
        ledger.charge([o.tokens for o in outcomes], sum(o.seconds for o in outcomes))
        if len(outcomes) < len(trials):
            fresh = _score(problem, trials[len(outcomes) :], minibatch)
            ledger.charge([o.tokens for o in fresh], sum(o.seconds for o in fresh))
            if journal:
                journal.record(fresh)
            outcomes = [*outcomes, *fresh]
        failed = next((o for o in outcomes if o.status == "failed"), None)
        if failed is not None and not any(o.status == "failed" for o in result.outcomes):
            _log.warning("trial %d failed (later failures are only counted): %s", failed.trial.number, failed.reason)
        result.outcomes.extend(outcomes)
        for outcome in outcomes:
            if outcome.usable:
                losses[outcome.trial.levels] = min(outcome.loss, losses.get(outcome.trial.levels, math.inf))
        before = time.perf_counter()
        searcher.tell(outcomes)
        result.searcher_seconds += time.perf_counter() - before
        for watcher in watchers:
            watcher.batch(outcomes, ledger)
        take_checkpoints(min(ledger.spent / budget.amount, 0.999999))
    take_checkpoints(1.0)
    result.stop_reason = result.stop_reason or "the budget is spent"
    result.best = searcher.recommend() if losses or not result.outcomes else None
    result.best_loss = losses.get(result.best, math.inf) if result.best is not None else math.inf
    result.seconds = time.perf_counter() - start
    result.scoring = problem.report()
    if journal:
        journal.finish(result)
    return result


def _check(trials: Sequence[Trial], problem: Problem) -> None:
    first = trials[0]
    for trial in trials:
        if not problem.space.feasible(trial.levels):
            problem.space.check(trial.levels)
        if trial.tokens != first.tokens or trial.minibatch != first.minibatch:
            raise InfeasibleError(f"trial {trial.number} asks for another minibatch than its batch: split the batch")


def _score(problem: Problem, trials: Sequence[Trial], minibatch: Minibatch) -> list[Outcome]:
    """Scores a batch; running out of memory fails its trials, any other exception ends the search: it is a fault."""
    start = time.perf_counter()
    try:
        scores = problem.score([t.levels for t in trials], minibatch, keep=trials[0].keep)
    except MemoryError as error:
        scores = [Score(math.nan, minibatch.tokens, reason=f"out of memory: {error}")] * len(trials)
    seconds = (time.perf_counter() - start) / len(trials)
    least = minibatch.tokens if problem.tokens else 0  # of a score that names no tokens: a search must come to its end
    return [_outcome(t, s, s.tokens or least, seconds, minibatch) for t, s in zip(trials, scores, strict=True)]


def _outcome(trial: Trial, score: Score, tokens: int, seconds: float, minibatch: Minibatch) -> Outcome:
    if math.isfinite(score.loss):
        status = "stopped" if score.stopped else "complete"
        return Outcome(trial, score.loss, tokens, seconds, minibatch.seed, status)  # type: ignore[arg-type]
    reason = score.reason or f"the loss is {score.loss}"
    return Outcome(trial, math.inf, tokens, seconds, minibatch.seed, "failed", reason)
