"""Multi-step selection around any searcher, so that EvoPress's selection can be studied apart from its mutation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from evo_hpo.search.budget import Allowance
from evo_hpo.search.procedure import Procedure, Steps
from evo_hpo.search.searcher import Searcher, draw
from evo_hpo.search.trial import Batch, Outcome, Status, Trial
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.evopress.selection import Selection
from searchers.wrapping import WrappingFamily

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

    def hear(self, stage: int, outcome: Outcome) -> None:
        """Takes in the outcome of a stage."""
        self.reached, self.loss = stage, outcome.loss
        self.first = self.first or outcome
        self.spent += outcome.tokens
        self.seconds += outcome.seconds


def _told(batch: Sequence[_Candidate], unique: dict[Assignment, _Candidate]) -> list[Outcome]:
    """What the inner searcher hears of its batch: the first-stage losses, in the final order."""
    ranked = sorted((c for c in unique.values() if c.first is not None), key=lambda c: (-c.reached, c.loss))
    usable = [c for c in ranked if c.loss < math.inf]
    losses = sorted(c.first.loss for c in usable if c.first is not None)
    given = {c.trial.levels: loss for c, loss in zip(usable, losses, strict=True)}
    told = []
    for candidate in batch:
        source = unique[candidate.trial.levels]
        if source.first is None:
            break
        loss = given.get(candidate.trial.levels)
        status: Status = "failed" if loss is None else "complete"
        reason = (source.first.reason or "failed in a later stage") if loss is None else ""
        told.append(
            replace(
                source.first,
                trial=candidate.trial,
                loss=math.inf if loss is None else loss,
                tokens=source.spent,
                seconds=source.seconds,
                status=status,
                reason=reason,
            )
        )
    return told


class MultiStep(Procedure):
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

    wrapped: ClassVar[type[Searcher]]

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
        self.searcher = self.wrapped(space, seed=seed, **settings)
        self.minibatch = draw("minibatch", minibatch)
        self._given = (survivors, tokens, elitism)
        self.selection = Selection.of(survivors, tokens, elitism)
        self.incumbent: Assignment | None = None
        self._least = math.inf  # loss of the incumbent in the last stage
        self._keeps = minibatch == "fixed" and elitism != "none"  # that loss stays what it is
        self._fallback: Assignment | None = None  # best of a first batch whose last stage was not reached
        self._generation = -1
        self._size = self.searcher.batch  # of the last batch: the next one is expected to be as large

    def fidelities(self) -> tuple[int | None, ...]:
        return tuple(stage.tokens for stage in self.selection.stages)

    def steps(self) -> Steps[None]:
        self._settle_stages()
        while (batch := self.searcher.ask(self._inner(self.allowance))) is not None:
            self._generation += 1
            self._size = len(batch)
            yield from self._screen(batch)
            yield None  # the inner searcher is asked with what is left
        self.stop_reason = self.searcher.stop_reason

    def _settle_stages(self) -> None:
        survivors, tokens, elitism = self._given
        last = self.allowance.default_tokens
        if not last:
            self._keeps = True
            self.selection = self.selection.in_one_stage()
        elif tokens is None:
            count = len(survivors)
            tokens = tuple(max(1, last // 8 ** (count - 1 - i)) for i in range(count))
            self.selection = Selection.of(survivors, tokens, elitism)

    def _inner(self, allowance: Allowance) -> Allowance:
        """What the inner searcher may spend: its trials at first-stage price, as many as all stages pay for."""
        count = self._size
        parents = int(self._generation >= 0 and not self._keeps)
        trials, tokens = self.selection.price(count, parents, allowance.default_tokens)
        first = self.selection.stages[0].tokens or allowance.default_tokens
        share = count * first / tokens if tokens else 1.0
        left = allowance.tokens
        return replace(
            allowance,
            tokens=None if left is None else max(int(left * share), min(first, left)),
            evaluations=None if allowance.evaluations is None else max(allowance.evaluations * count // trials, 1),
            default_tokens=first,
        )

    def _screen(self, batch: Batch) -> Steps[None]:
        """Ranks the batch in stages, moves to the winner of the last one, and tells the inner searcher."""
        candidates = [_Candidate(t) for t in batch]
        unique = {c.trial.levels: c for c in reversed(candidates)}
        alive = list(unique.values())[::-1]
        last = len(self.selection.stages) - 1
        for number, stage in enumerate(self.selection.stages):
            if not self.selection.needed(len(alive), number):
                continue
            if self.incumbent is not None and self.selection.joins(number) and not (number == last and self._keeps):
                # It may be of this batch too, and screened out.
                again = unique.get(self.incumbent) or _Candidate(Trial(-1, self.incumbent))
                alive = [again, *(c for c in alive if c.trial.levels != self.incumbent)]
            outcomes = yield self.propose(
                [c.trial.levels for c in alive],
                tokens=stage.tokens,
                draw=self.minibatch,
                generation=self._generation,
                stage=number,
            )
            told = list(zip(alive, outcomes, strict=False))
            for candidate, outcome in told:
                candidate.hear(number, outcome)
            told.sort(key=lambda pair: pair[1].loss)
            alive = [c for c, o in told if o.usable][: stage.survivors]
            if not alive:
                break
            best = alive[0]
            if number == last and not (self._keeps and best.loss >= self._least):
                self.incumbent, self._least = best.trial.levels, best.loss
            elif self.incumbent is None:
                self._fallback = best.trial.levels
        told_inner = _told(candidates, unique)
        if told_inner:
            self.searcher.tell(told_inner)

    def recommend(self) -> Assignment | None:
        """The winner of the last stage of the last complete batch."""
        return self.incumbent or self._fallback or self.searcher.recommend()


family = WrappingFamily(
    "multi_step",
    MultiStep,
    OWN,
    "Multi-step selection around {}: screens its batches on few tokens, survivors on more.",
    MEMBERS,
    random=True,
)
"""The entry point. Those listed are ours that propose batches."""
