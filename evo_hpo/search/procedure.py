"""Searchers that read as straight-line code: a generator yields batches and is sent their outcomes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.budget import Allowance
from evo_hpo.search.searcher import MANY, Searcher, draw, positive
from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.search.trial import Batch, Outcome, Probe
from evo_hpo.space.compression_space import Assignment, CompressionSpace

Returned = TypeVar("Returned")
Steps = Generator[Batch | Probe | None, Any, Returned]
"""Yields batches, is sent the outcomes of each (a list, shorter where the budget ends in it), returns a result. It may
yield a probe too, through :meth:`Procedure.sensitivities`, and is sent what was measured. It yields None
where it wants to know what is left to spend before it goes on: it does so when the searcher is asked again."""

UNLIMITED = 10**9
IDLE = 2_000  # consecutive requests that cost nothing, after which a procedure has nothing new to ask


class _Exhausted(Exception):
    """The procedure keeps asking for what is already known."""


class Procedure(Searcher):
    """Base of searchers that write their algorithm once, as the generator :meth:`steps`.

    The generator goes on as soon as outcomes are told, up to the next batch that it yields, so what it has learnt is
    in its attributes (and in ``recommend``) when ``tell`` returns. A batch is cut to what the allowance pays.

    Attributes:
        allowance: what is left to spend, kept up to date between requests (a trial counted at its batch's tokens).
    """

    def __init__(self, space: CompressionSpace, *, seed: int = 0) -> None:
        super().__init__(space, seed=seed)
        self.allowance = Allowance()
        self._generator: Steps[None] | None = None
        self._yielded: Batch | Probe | None = None

    @abstractmethod
    def steps(self) -> Steps[None]:
        """The algorithm; returning ends the search, before anything was asked after the uniform assignment is."""

    @property
    def pending(self) -> Batch | Probe | None:
        """What it will ask for next, where it has decided already."""
        return self._yielded

    def next_probe(self, allowance: Allowance) -> Probe | None:
        """The probe that the generator has yielded, if it has."""
        self._wait(allowance)
        return self._yielded if isinstance(self._yielded, Probe) else None

    def ask(self, allowance: Allowance) -> Batch | None:
        """The batch that the generator has yielded, no more of it than the allowance pays."""
        self._wait(allowance)
        if self._yielded is None:
            return None
        if isinstance(self._yielded, Probe):
            raise InvalidSettingError(f"{type(self).__name__} asks for sensitivities: it cannot be run inside another")
        whole = self._yielded
        self._yielded = batch = whole.first(max(1, allowance.affords(len(whole), whole.tokens)))
        self._asked -= len(whole) - len(batch)
        return batch

    def _wait(self, allowance: Allowance) -> None:
        """Has the generator yield its next request."""
        self.allowance = allowance
        if self._generator is None:
            self._generator = self.steps()
        if self._yielded is None:
            self._advance()

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        assert isinstance(self._yielded, Batch)
        self.allowance = self.allowance.less(len(outcomes), self._yielded.tokens)
        self._yielded = None
        self._advance(outcomes)

    def learn_sensitivities(self, found: Sensitivities) -> None:
        """Hands them to the generator."""
        assert isinstance(self._yielded, Probe)
        reads = self._yielded.reads  # of the text that there was, if less than was asked for
        self.allowance = self.allowance.less(reads, found.tokens // reads if reads else 0)
        self._yielded = None
        self._advance(found)

    def sensitivities(self, probe: Probe) -> Steps[Sensitivities]:
        """What the probe gives; ``found = yield from self.sensitivities(Probe(...))``."""
        found = yield probe
        assert isinstance(found, Sensitivities)
        return found

    def _advance(self, told: Sequence[Outcome] | Sensitivities | None = None) -> None:
        """Runs to the next batch; where something is told, a pause before it lasts until the searcher is asked."""
        assert self._generator is not None
        try:
            if told is not None:
                self._yielded = self._generator.send(told if isinstance(told, Sensitivities) else list(told))
                return
            while self._yielded is None:
                self._yielded = next(self._generator)
        except StopIteration:
            self.stop_reason = self.stop_reason or "converged"
            if not self._asked:  # what finds nothing to try still scores where it would start
                self._yielded = self.propose([self.space.uniform()])
        except _Exhausted:
            self.stop_reason = f"no assignment that is new in {IDLE} tries"


class OneFidelity(Procedure):
    """Base of procedures that score every trial on one fidelity.

    It cuts what they want to know into batches, keeps the incumbent, and re-uses losses that were already paid for on
    the same minibatch.

    Args:
        batch: trials a batch; on ``fresh`` minibatches each request is one batch, whatever its size.
        tokens: calibration tokens a trial; None: the problem's default.
        minibatch: ``fixed``: one minibatch for the whole search, so that losses compare across batches and none is paid
            twice; ``fresh``: a new one for each request, on which the reference is scored again.

    Attributes:
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
        self.batch = positive("batch", batch, most=MANY)
        self.tokens = tokens if tokens is None else positive("tokens", tokens)
        self.minibatch = draw("minibatch", minibatch)
        self.incumbent: Assignment | None = None
        self._known: dict[Assignment, float] = {}
        self._idle = 0

    def fidelities(self) -> tuple[int | None, ...]:
        return (self.tokens,)

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Remembers the best, and hands the outcomes on."""
        self.remember(outcomes)
        super().tell(outcomes)

    def recommend(self) -> Assignment | None:
        """The best on the fixed minibatch; on fresh ones, where losses do not compare, the procedure's incumbent."""
        if self.minibatch == "fresh" and self.incumbent is not None:
            return self.incumbent
        return super().recommend()

    # ------------------------------------------------------------------ for subclasses

    def request(self, assignments: Sequence[Assignment]) -> Batch:
        """A batch of these assignments."""
        return self.propose(assignments, tokens=self.tokens, draw=self.minibatch)

    def score(self, assignments: Sequence[Assignment]) -> Steps[list[Outcome]]:
        """Outcomes of all the assignments, in as many batches as it takes."""
        told: list[Outcome] = []
        size = len(assignments) if self.minibatch == "fresh" else self.batch
        while len(told) < len(assignments):
            told += yield self.request(assignments[len(told) : len(told) + size])
        return told

    def measure(
        self, candidates: Sequence[Assignment], reference: Assignment | None = None
    ) -> Steps[tuple[list[float], float]]:
        """Losses of the candidates and of the reference, all on one minibatch; failed trials are ``inf``.

        On the fixed minibatch only assignments that were never scored are asked for.
        """
        wanted = list(dict.fromkeys(candidates if reference is None else [reference, *candidates]))
        found = self._known
        if self.minibatch == "fresh":
            found = {}
        else:
            wanted = [a for a in wanted if a not in found]
            self._idle = 0 if wanted else self._idle + 1
            if self._idle > IDLE:
                raise _Exhausted
        found.update({o.trial.levels: o.loss for o in (yield from self.score(wanted))})
        return [found[a] for a in candidates], math.nan if reference is None else found[reference]

    def improve(self, candidates: Sequence[Assignment], current: Assignment) -> Steps[tuple[Assignment, float, bool]]:
        """Scores candidates against the current assignment: (the best of all, its gain, whether it is a candidate)."""
        losses, reference = yield from self.measure(candidates, current)
        best = min(range(len(losses)), key=losses.__getitem__, default=None)
        if best is None or not losses[best] < reference:
            return current, 0.0, False
        return candidates[best], reference - losses[best], True

    def trials_left(self, default: int) -> int:
        """Trials that the rest of the budget pays; ``default`` where the budget is in seconds."""
        left = self.allowance.affords(UNLIMITED, self.tokens)
        return default if left == UNLIMITED else left


class Sampling(OneFidelity):
    """Base of searchers that draw batch after batch; the best of a batch becomes the incumbent.

    On fresh minibatches, where losses do not compare across batches, the incumbent is scored again at the head of each.
    """

    @abstractmethod
    def sample(self, count: int) -> Sequence[Assignment] | None:
        """Up to ``count`` assignments, which the allowance pays; None ends the search."""

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """What became of the assignments that were sampled last; fewer where the budget ended inside the batch."""

    def steps(self) -> Steps[None]:
        while True:
            yield None  # no more is drawn than can be paid
            again = [] if self.incumbent is None or self.minibatch == "fixed" else [self.incumbent]
            count = max(1, self.allowance.affords(self.batch + len(again), self.tokens)) - len(again)
            sampled = self.sample(count)
            if sampled is None:
                return
            outcomes = yield self.request([*again, *sampled])
            usable = [o for o in outcomes if o.usable]
            if usable:
                self.incumbent = min(usable, key=lambda o: o.loss).trial.levels
            self.learn(outcomes[len(again) :])
