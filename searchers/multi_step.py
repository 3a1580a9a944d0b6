"""Multi-step selection around any searcher, so that EvoPress's selection can be studied apart from its mutation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

from evo_hpo.errors import UnknownNameError
from evo_hpo.search.budget import Allowance
from evo_hpo.search.registry import searcher_class
from evo_hpo.search.searcher import Searcher, draw, settings_of
from evo_hpo.search.trial import Outcome, Status, Trial
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.evopress.selection import Selection

__all__ = ["MultiStep", "family"]

MEMBERS = ("best_of_random", "genetic", "local_search", "random", "simulated_annealing")
OWN = ("survivors", "tokens", "minibatch", "elitism")


@dataclass
class _Candidate:
    """One trial of the inner searcher, on its way through the stages."""

    trial: Trial
    reached: int = -1
    loss: float = math.inf
    first: Outcome | None = None
    spent: int = 0
    seconds: float = 0.0


class MultiStep(Searcher):
    """Screens each batch of another searcher on few tokens, and only the survivors on more, beside the incumbent.

    The stages are those of EvoPress (arXiv 2410.14649, section 3.3). The inner searcher is told one loss a trial: the
    batch's first-stage losses, handed out anew in the order in which the stages ranked the batch. So it sees the scale
    of one fidelity and the ranking of all. A problem without fidelity has nothing to screen on: there the stages are
    one, and the incumbent, whose loss is known, is not measured again.

    Args:
        survivors: how many of a batch each stage keeps.
        tokens: calibration tokens of each stage; None: an eighth of the problem's default, then the default.
        minibatch: ``fresh`` for each stage, or one ``fixed`` minibatch.
        elitism: where the incumbent joins: ``index`` (the last stage), ``count`` or ``none``.
        settings: the inner searcher's own; its batch is the number of offspring.
    """

    inner: ClassVar[type[Searcher]]

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        survivors: Sequence[int] = (4, 1),
        tokens: Sequence[int] | int | None = None,
        minibatch: str = "fresh",
        elitism: str = "index",
        **settings: Any,
    ) -> None:
        super().__init__(space, seed=seed)
        self.searcher = self.inner(space, seed=seed, **settings)
        self.minibatch = draw("minibatch", minibatch)
        self._given = (survivors, tokens, elitism)
        self.selection = Selection.of(survivors, tokens, elitism)
        self.incumbent: Assignment | None = None
        self._least = math.inf  # loss of the incumbent in the last stage
        self._keeps = minibatch == "fixed" and elitism != "none"  # that loss stays what it is
        self._fallback: Assignment | None = None  # best of a first batch whose last stage was not reached
        self._stage = 0
        self._batch: list[_Candidate] = []
        self._unique: dict[Assignment, _Candidate] = {}  # of the batch
        self._alive: list[_Candidate] = []
        self._asking: list[_Candidate] = []
        self._generation = -1
        self._size = 0  # of the last batch: the next one is expected to be as large

    def ask(self, allowance: Allowance) -> tuple[Trial, ...]:
        """The next stage of the batch, or the first stage of the inner searcher's next batch."""
        if not self._batch:
            if self._generation < 0:
                self._settle_stages(allowance)
            if not self._next_batch(allowance):
                return ()
        stage = self.selection.stages[self._stage]
        last = self._stage == len(self.selection.stages) - 1
        self._asking = list(self._alive)
        if self.incumbent is not None and self.selection.joins(self._stage) and not (last and self._keeps):
            others = [c for c in self._alive if c.trial.levels != self.incumbent]
            again = next((c for c in self._alive if c.trial.levels == self.incumbent), None)
            again = again or self._unique.get(self.incumbent)  # of this batch too, and screened out
            self._asking = [again or _Candidate(Trial(-1, self.incumbent)), *others]
        self._asking = self._asking[: max(1, allowance.affords(len(self._asking), stage.tokens))]
        return tuple(
            self.trial(
                candidate.trial.levels,
                tokens=stage.tokens,
                minibatch=self.minibatch,
                generation=self._generation,
                stage=self._stage,
            )
            for candidate in self._asking
        )

    def _settle_stages(self, allowance: Allowance) -> None:
        survivors, tokens, elitism = self._given
        if not allowance.default_tokens:
            self._keeps = True
            self.selection = self.selection.in_one_stage()
        elif tokens is None:
            last, count = allowance.default_tokens, len(survivors)
            tokens = tuple(max(1, last // 8 ** (count - 1 - i)) for i in range(count))
            self.selection = Selection.of(survivors, tokens, elitism)

    def _next_batch(self, allowance: Allowance) -> bool:
        trials = self.searcher.ask(self._inner(allowance))
        self.stop_reason = self.searcher.stop_reason
        self._generation += 1
        self._batch = [_Candidate(t) for t in trials]
        self._size = len(trials)
        self._unique = {c.trial.levels: c for c in reversed(self._batch)}
        self._alive = list(self._unique.values())[::-1]
        self._stage = 0
        while self._batch and not self.selection.needed(len(self._alive), self._stage):
            self._stage += 1
        return bool(trials)

    def _inner(self, allowance: Allowance) -> Allowance:
        """What the inner searcher may spend: its trials at first-stage price, as many as all stages pay for."""
        count = self._size or int(getattr(self.searcher, "batch", 1))
        parents = int(self._generation >= 0 and not self._keeps)
        trials, tokens = self.selection.price(count, parents, allowance.default_tokens)
        first = self.selection.stages[0].tokens or allowance.default_tokens
        share = count * first / tokens if tokens else 1.0
        return Allowance(
            None if allowance.tokens is None else max(int(allowance.tokens * share), min(first, allowance.tokens)),
            None if allowance.evaluations is None else max(allowance.evaluations * count // trials, 1),
            first,
        )

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Ranks the stage; after the last one, moves to the winner and tells the inner searcher."""
        told = list(zip(self._asking, outcomes, strict=False))
        for candidate, outcome in told:
            candidate.reached, candidate.loss = self._stage, outcome.loss
            candidate.first = candidate.first or outcome
            candidate.spent += outcome.tokens
            candidate.seconds += outcome.seconds
        told.sort(key=lambda pair: pair[1].loss)
        self._alive = [c for c, o in told if o.usable][: self.selection.stages[self._stage].survivors]
        last = self._stage == len(self.selection.stages) - 1
        if last and self._alive and not (self._keeps and self._alive[0].loss >= self._least):
            self.incumbent, self._least = self._alive[0].trial.levels, self._alive[0].loss
        elif self.incumbent is None and self._alive:
            self._fallback = self._alive[0].trial.levels
        self._stage += 1
        while not last and not self.selection.needed(len(self._alive), self._stage):
            self._stage += 1
        if last or not self._alive:
            self._finish()

    def _finish(self) -> None:
        """Tells the inner searcher the first-stage losses in the final order."""
        by_levels = {levels: c for levels, c in self._unique.items() if c.reached >= 0}
        ranked = sorted(by_levels.values(), key=lambda c: (-c.reached, c.loss))
        usable = [c for c in ranked if c.first is not None and c.loss < math.inf]
        losses = sorted(c.first.loss for c in usable if c.first is not None)
        given = {c.trial.levels: loss for c, loss in zip(usable, losses, strict=True)}
        told = []
        for candidate in self._batch:
            source = by_levels.get(candidate.trial.levels)
            if source is None or source.first is None:
                break
            loss = given.get(candidate.trial.levels, math.inf)
            status: Status = "complete" if candidate.trial.levels in given else "failed"
            told.append(
                replace(
                    source.first,
                    trial=candidate.trial,
                    loss=loss,
                    tokens=source.spent,
                    seconds=source.seconds,
                    status=status,
                    reason="" if status == "complete" else (source.first.reason or "failed in a later stage"),
                )
            )
        self._batch = []
        if told:
            self.searcher.tell(told)

    def recommend(self) -> Assignment | None:
        """The winner of the last stage of the last complete batch."""
        return self.incumbent or self._fallback or self.searcher.recommend()


class _Family:
    """``multi_step:NAME`` for any searcher NAME; those listed are ours that propose batches."""

    def members(self) -> tuple[str, ...]:
        """Our searchers that propose batches; other names work too."""
        return MEMBERS

    def member(self, name: str) -> type[Searcher]:
        """The wrapped searcher class.

        Raises:
            UnknownNameError: no such searcher, or it is itself multi-step.
        """
        if name.partition(":")[0] == "multi_step":
            raise UnknownNameError(f"multi_step cannot wrap {name!r}: it is multi-step already")
        return _wrapped(name)


@cache
def _wrapped(name: str) -> type[Searcher]:
    inner = searcher_class(name)

    def start(self: MultiStep, space: CompressionSpace, *, seed: int = 0, **settings: Any) -> None:
        MultiStep.__init__(self, space, seed=seed, **settings)

    own = list(inspect.signature(MultiStep.__init__).parameters.values())[:-1]
    passed = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=value)
        for key, value in settings_of(inner).items()
        if key not in OWN
    ]
    start.__signature__ = inspect.Signature([*own, *passed])  # type: ignore[attr-defined]
    summary = f"Multi-step selection around {name}: screens its batches on few tokens, survivors on more."
    return type(
        f"MultiStep[{name}]", (MultiStep,), {"__init__": start, "inner": inner, "__doc__": summary, "random": True}
    )


family = _Family()
"""The entry point."""
