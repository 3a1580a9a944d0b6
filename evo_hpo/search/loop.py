"""The one loop: ask, charge, score, tell, and now and then look at held-out data."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from threadpoolctl import ThreadpoolController

from evo_hpo.errors import BudgetError, InvalidSettingError
from evo_hpo.search.budget import Budget, Ledger
from evo_hpo.search.checkpoint import Checkpoint, FrontPoint, not_dominated, thinned
from evo_hpo.search.problem import Minibatch, Problem, Score
from evo_hpo.search.searcher import Searcher
from evo_hpo.search.trial import Batch, Draw, Measured, Outcome, Probe, Status, Terms, Trial
from evo_hpo.space.compression_space import Assignment

__all__ = ["Checkpoint", "Observer", "Recorder", "SearchResult", "search"]

_log = logging.getLogger(__name__)


@dataclass
class SearchResult:
    """Everything a search found.

    Attributes:
        best: the searcher's recommendation, feasible; None when every trial failed.
        best_loss: least calibration loss that ``best`` got (lower is better); compare searches by held-out data.
        front: over a range of budgets, the points that the search gives, ascending in cost.
        outcomes: every trial, in order.
        checkpoints: held-out figures along the budget.
        ledger: what was spent.
        seconds: wall-clock of the whole loop; ``searcher_seconds``: of it, inside ask and tell.
        stop_reason: why the search ended.
        scoring: what the problem says about how it scored, see :meth:`evo_hpo.search.problem.Problem.report_since`.
    """

    best: Assignment | None = None
    best_loss: float = math.inf
    front: tuple[FrontPoint, ...] = ()
    outcomes: list[Outcome] = field(default_factory=list, repr=False)
    probes: list[Measured] = field(default_factory=list, repr=False)
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

    def probe(self, measured: Measured, ledger: Ledger) -> None:
        """Sensitivities were measured and told."""

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Held-out figures of the incumbent were taken."""


class Recorder(Protocol):
    """Keeps what was paid for, and gives it back on resume. Implemented by :class:`evo_hpo.record.journal.Journal`."""

    def recall(self, batch: Batch, minibatch: Minibatch) -> list[Outcome]:
        """Recorded outcomes of the first trials of this batch (all, some or none), in order.

        Raises:
            JournalError: the journal holds other trials at this point.
        """

    def recall_checkpoint(self, fraction: float, levels: Assignment) -> Checkpoint | None:
        """The recorded checkpoint of this fraction and incumbent, if any."""

    def recall_probe(self, probe: Probe, minibatch: Minibatch) -> Measured | None:
        """What the recorded probe gave, if any is recorded at this point.

        Raises:
            JournalError: it is another probe.
        """

    def record_probe(self, measured: Measured) -> None:
        """Keeps new sensitivities durably before they are told."""

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
    searcher.check_sensitivities(problem.name, problem.has_sensitivities)
    start = time.perf_counter()
    run = _Run(searcher, problem, budget, seed, journal, tuple(observers), sorted(checkpoints))
    with one_blas_thread():
        while not run.ledger.exhausted and (request := run.ask()) is not None:
            if isinstance(request, Probe):
                run.measure(request)
            else:
                run.tell(run.score(request, run.minibatch(request.terms.draw, request.tokens)))
            run.take_checkpoints(min(run.ledger.spent / budget.amount, 0.999999))
    run.take_checkpoints(1.0)
    result = run.finish()
    result.seconds = time.perf_counter() - start
    if journal:
        journal.finish(result)
    return result


def one_blas_thread() -> AbstractContextManager[Any]:
    """numpy rounds otherwise with other threads, and searchers then ask otherwise.

    Where searches run in threads, the one that starts them holds it too: libraries listen to the first holder alone.
    """
    found: AbstractContextManager[Any] = _libraries(len(sys.modules)).limit(limits=1, user_api="blas")
    return found


@lru_cache(maxsize=1)
def _libraries(_: int) -> ThreadpoolController:
    """The numeric libraries of this process; looked for anew (milliseconds) where more is imported since."""
    return ThreadpoolController()


class _Run:
    """One search under way: the steps of :func:`search`, on what they share."""

    def __init__(
        self,
        searcher: Searcher,
        problem: Problem,
        budget: Budget,
        seed: int,
        journal: Recorder | None,
        observers: Sequence[Observer],
        due: list[float],
    ) -> None:
        self.searcher = searcher
        self.problem = problem
        self.ledger = Ledger(budget, problem.tokens, problem.pool_tokens)
        self.journal = journal
        self.observers = observers
        self.due = due  # fractions of the checkpoints that are not taken yet
        self.result = SearchResult(ledger=self.ledger)
        self.reported = problem.report()
        self.losses: dict[Assignment, float] = {}
        self.draws = np.random.default_rng([seed, 0x6D62])
        self.fixed = self.last = int(self.draws.integers(2**31))

    def ask(self) -> Batch | Probe | None:
        """The next batch, as much of it as can be paid, or a probe; None: the search ends, and the result says why."""
        allowance = self.ledger.allowance()
        before = time.perf_counter()
        probe = self.searcher.next_probe(allowance)
        pool = self.problem.pool_tokens
        if probe is not None and pool and (probe.tokens or 0) > pool:  # more text than there is tells no more
            probe = replace(probe, tokens=pool)
        batch = None if probe else self.searcher.ask(allowance)
        self.result.searcher_seconds += time.perf_counter() - before
        if probe is not None:
            if allowance.affords(probe.reads, probe.tokens) == probe.reads:
                return probe
            self.result.stop_reason = "the budget does not pay for the sensitivities"
            return None
        if batch is None:
            self.result.stop_reason = self.searcher.stop_reason or "the searcher has nothing more to ask"
            return None
        if not isinstance(batch, Batch):
            raise InvalidSettingError(f"ask returned {batch!r}: return a Batch of trials, made by self.trial(levels)")
        affordable = allowance.affords(len(batch), batch.tokens)
        if not affordable:
            if not self.result.outcomes:
                budget = self.ledger.budget
                raise BudgetError(
                    f"a budget of {budget.amount:g} {budget.kind} does not pay for one trial of "
                    f"{batch.tokens or self.problem.tokens} tokens: raise it or score on fewer tokens"
                )
            self.result.stop_reason = "the budget does not pay for another trial"
            return None
        batch = batch.first(affordable)
        for trial in batch:
            if not self.problem.space.feasible(trial.levels):
                self.problem.space.check(trial.levels)
        return batch

    def minibatch(self, draw: Draw, tokens: int | None) -> Minibatch:
        """The data that a request asks for."""
        if draw == "fresh":
            self.last = int(self.draws.integers(2**31))
        seed = self.fixed if draw == "fixed" else self.last
        return Minibatch(seed, self.problem.tokens if tokens is None else tokens)

    def measure(self, probe: Probe) -> None:
        """Sensitivities, recalled or measured, charged and told."""
        minibatch = replace(self.minibatch(probe.draw, probe.tokens), generated=probe.generated)
        measured = self.journal.recall_probe(probe, minibatch) if self.journal else None
        if measured is None:
            start = time.perf_counter()
            found = self.problem.sensitivities(probe.reference, minibatch, kind=probe.kind, form=probe.form)
            measured = Measured(probe, found, time.perf_counter() - start, minibatch.seed)
            if self.journal:
                self.journal.record_probe(measured)
        self.ledger.charge(probe.cost(self.problem.tokens), measured.seconds)
        self.result.probes.append(measured)
        before = time.perf_counter()
        self.searcher.learn_sensitivities(measured.sensitivities)
        self.result.searcher_seconds += time.perf_counter() - before
        for observer in self.observers:
            observer.probe(measured, self.ledger)

    def score(self, batch: Batch, minibatch: Minibatch) -> list[Outcome]:
        """Outcomes of the batch, charged: those that the journal holds, and new ones, which it keeps."""
        outcomes = self.journal.recall(batch, minibatch) if self.journal else []
        self._charge(outcomes)
        if len(outcomes) < len(batch):
            fresh = _score(self.problem, batch.trials[len(outcomes) :], batch.terms, minibatch)
            self._charge(fresh)
            if self.journal:
                self.journal.record(fresh)
            outcomes = [*outcomes, *fresh]
        return outcomes

    def _charge(self, outcomes: Sequence[Outcome]) -> None:
        self.ledger.charge([o.tokens for o in outcomes], sum(o.seconds for o in outcomes))

    def tell(self, outcomes: list[Outcome]) -> None:
        """Keeps the outcomes, and lets the searcher and the observers hear of them."""
        failed = next((o for o in outcomes if o.status == "failed"), None)
        if failed is not None and not any(o.status == "failed" for o in self.result.outcomes):
            _log.warning("trial %d failed (later failures are only counted): %s", failed.trial.number, failed.reason)
        self.result.outcomes.extend(outcomes)
        for outcome in outcomes:
            if outcome.usable:
                levels = outcome.trial.levels
                self.losses[levels] = min(outcome.loss, self.losses.get(levels, math.inf))
        before = time.perf_counter()
        self.searcher.tell(outcomes)
        self.result.searcher_seconds += time.perf_counter() - before
        for observer in self.observers:
            observer.batch(outcomes, self.ledger)

    def take_checkpoints(self, spent: float) -> None:
        """Validates the incumbent at every checkpoint that is due at this share of the budget."""
        while self.due and spent >= self.due[0] - 1e-12:
            fraction = self.due.pop(0)
            levels = self.searcher.recommend()
            if levels is None:
                continue
            checkpoint = self._checkpoint(fraction, levels)
            self.result.checkpoints.append(checkpoint)
            for observer in self.observers:
                observer.checkpoint(checkpoint)

    def _checkpoint(self, fraction: float, levels: Assignment) -> Checkpoint:
        """The one that the journal holds, or a new one, which it keeps."""
        known = self.journal.recall_checkpoint(fraction, levels) if self.journal else None
        if known is None:
            figures, spent = self.problem.validate(levels), self.ledger
            front = tuple(replace(p, held_out=self.problem.validate(p.levels)) for p in self._front())
            known = Checkpoint(fraction, spent.tokens, spent.evaluations, spent.seconds, levels, figures, front)
            if self.journal:
                self.journal.record_checkpoint(known)
        return known

    def _front(self) -> Iterable[FrontPoint]:
        """What the searcher would give over a range of budgets; nothing where there is one budget."""
        space = self.problem.space
        if not space.ranged:
            return
        front = self.searcher.front()
        for levels in thinned(space, not_dominated(space, self.result.outcomes) if front is None else front):
            yield FrontPoint(space.check(levels), space.cost(levels), self.losses.get(levels, math.inf))

    def finish(self) -> SearchResult:
        """The result, with what the searcher recommends."""
        result = self.result
        result.stop_reason = result.stop_reason or "the budget is spent"
        result.best = self.searcher.recommend() if self.losses or not result.outcomes else None
        result.best_loss = self.losses.get(result.best, math.inf) if result.best is not None else math.inf
        result.front = result.checkpoints[-1].front if result.checkpoints else tuple(self._front())
        result.scoring = self.problem.report_since(self.reported)
        return result


def _score(problem: Problem, trials: Sequence[Trial], terms: Terms, minibatch: Minibatch) -> list[Outcome]:
    """Scores trials; running out of memory fails them, any other exception ends the search: it is a fault."""
    start = time.perf_counter()
    try:
        scores = problem.score([t.levels for t in trials], minibatch, keep=terms.keep)
    except MemoryError as error:
        scores = [Score(math.nan, minibatch.tokens, reason=f"out of memory: {error}")] * len(trials)
    seconds = (time.perf_counter() - start) / len(trials)
    least = minibatch.tokens if problem.tokens else 0  # of a score that names no tokens: a search must come to its end
    return [_outcome(t, s, s.tokens or least, seconds, minibatch, terms) for t, s in zip(trials, scores, strict=True)]


def _outcome(trial: Trial, score: Score, tokens: int, seconds: float, minibatch: Minibatch, terms: Terms) -> Outcome:
    if math.isfinite(score.loss):
        status: Status = "stopped" if score.stopped else "complete"
        parts = score.by_sequence if terms.by_sequence and not score.stopped else None
        return Outcome(trial, score.loss, tokens, seconds, minibatch.seed, status, terms=terms, by_sequence=parts)
    reason = score.reason or f"the loss is {score.loss}"
    return Outcome(trial, math.inf, tokens, seconds, minibatch.seed, "failed", reason, terms)
