"""Searchers that read as straight-line code: a generator asks for assignments and gets their losses back.

A :class:`Procedure` writes its algorithm once, in ``steps``; this base cuts what it asks for into batches that the
allowance pays, keeps the incumbent, and re-uses losses that were already paid for on the same minibatch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator, Sequence
from typing import TypeVar

from evo_hpo.search.budget import Allowance
from evo_hpo.search.searcher import Searcher, draw, positive
from evo_hpo.search.trial import Outcome, Trial
from evo_hpo.space.compression_space import Assignment, CompressionSpace

__all__ = ["Procedure", "Steps"]

Result = TypeVar("Result")
Steps = Generator[Sequence[Assignment], list[Outcome], Result]
"""Yields the assignments to score, is sent their outcomes, returns a result."""

UNLIMITED = 10**9
IDLE = 2_000  # consecutive requests that cost nothing, after which a procedure has nothing new to ask


class _Exhausted(Exception):
    """The procedure keeps asking for what is already known."""


class Procedure(Searcher):
    """Base of searchers that score every trial on one fidelity.

    Args:
        batch: trials a batch; on ``fresh`` minibatches each request is one batch, whatever its size.
        tokens: calibration tokens a trial; None: the problem's default.
        minibatch: ``fixed``: one minibatch for the whole search, so that losses compare across batches and none is paid
            twice; ``fresh``: a new one for each request, on which the reference is scored again.

    Attributes:
        allowance: what is left to spend, kept up to date between requests.
        incumbent: the assignment that the procedure itself trusts most.
    """

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        batch: int = 8,
        tokens: int | None = None,
        minibatch: str = "fixed",
    ) -> None:
        super().__init__(space, seed=seed)
        self.batch = positive("batch", batch)
        self.tokens = tokens if tokens is None else positive("tokens", tokens)
        self.minibatch = draw("minibatch", minibatch)
        self.allowance = Allowance()
        self.incumbent: Assignment | None = None
        self._known: dict[Assignment, float] = {}
        self._running: Steps[None] | None = None
        self._queue: list[Assignment] = []
        self._told: list[Outcome] = []
        self._idle = 0

    @abstractmethod
    def steps(self) -> Steps[None]:
        """The algorithm; returning ends the search."""

    # ------------------------------------------------------------------ ask and tell

    def ask(self, allowance: Allowance) -> tuple[Trial, ...]:
        """The next batch of what the procedure wants to know, no more than the allowance pays."""
        self.allowance = allowance
        if self._running is None:
            self._running = self.steps()
            self._resume(first=True)
        if not self._queue:
            return ()
        wanted = len(self._queue) if self.minibatch == "fresh" else min(self.batch, len(self._queue))
        count = max(1, allowance.affords(wanted, self.tokens))
        return tuple(self.trial(a, tokens=self.tokens, minibatch=self.minibatch) for a in self._queue[:count])

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Hands the losses to the procedure once all that it asked for are there."""
        self.remember(outcomes)
        del self._queue[: len(outcomes)]
        self._told.extend(outcomes)
        self.allowance = self.allowance.less(len(outcomes), self.tokens)
        if not self._queue:
            self._resume()

    def _resume(self, first: bool = False) -> None:
        assert self._running is not None
        told, self._told = self._told, []
        try:
            self._queue = list(next(self._running) if first else self._running.send(told))
        except StopIteration:
            # A procedure that finds nothing to try still scores where it would start.
            self._queue = [] if self._asked else [self.space.uniform()]
            self.stop_reason = self.stop_reason or "converged"
        except _Exhausted:
            self._queue = []
            self.stop_reason = f"no assignment that is new in {IDLE} tries"

    def recommend(self) -> Assignment | None:
        """The best on the fixed minibatch; on fresh ones, where losses do not compare, the procedure's incumbent."""
        if self.minibatch == "fresh" and self.incumbent is not None:
            return self.incumbent
        return super().recommend()

    # ------------------------------------------------------------------ for subclasses

    def measure(
        self, candidates: Sequence[Assignment], reference: Assignment | None = None
    ) -> Steps[tuple[list[float], float]]:
        """Losses of the candidates and of the reference, all on one minibatch; failed trials are ``inf``.

        On the fixed minibatch only assignments that were never scored are asked for.
        """
        wanted = list(candidates) if reference is None else [reference, *candidates]
        if self.minibatch == "fresh":
            found = {o.trial.levels: o.loss for o in (yield list(dict.fromkeys(wanted)))} if wanted else {}
        else:
            found = self._known
            missing = [a for a in dict.fromkeys(wanted) if a not in found]
            self._idle = 0 if missing else self._idle + 1
            if self._idle > IDLE:
                raise _Exhausted
            if missing:
                found.update({o.trial.levels: o.loss for o in (yield missing)})
        return [found[a] for a in candidates], math.nan if reference is None else found[reference]

    def improve(self, candidates: Sequence[Assignment], current: Assignment) -> Steps[tuple[Assignment, float, bool]]:
        """Scores candidates against the current assignment: (the best of all, its gain, whether it is a candidate)."""
        losses, reference = yield from self.measure(candidates, current)
        best = min(range(len(losses)), key=losses.__getitem__, default=None)
        if best is None or not losses[best] < reference:
            return current, 0.0, False
        return candidates[best], reference - losses[best], True

    def horizon(self, default: int) -> int:
        """Trials that the rest of the budget pays; ``default`` where the budget is in seconds."""
        left = self.allowance.affords(UNLIMITED, self.tokens)
        return default if left == UNLIMITED else left
