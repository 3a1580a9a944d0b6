"""Searches at several single budgets of a range, side by side on one purse."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.budget import Allowance
from evo_hpo.search.searcher import Searcher, positive
from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.search.trial import Batch, Outcome, Probe, Trial
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from evo_hpo.space.ranges import at, marks


class Interleaved(Searcher):
    """Base of searchers that run an inner search at each of several budgets; who has spent least is asked next.

    Every inner search may spend an equal share of the purse; what one leaves goes to those that still run.

    Args:
        budgets: how many, evenly spaced over the range, both ends among them.
    """

    def __init__(self, space: CompressionSpace, *, seed: int = 0, budgets: int = 5) -> None:
        super().__init__(space, seed=seed)
        self.budgets = positive("budgets", budgets, least=2, most=1000)
        self._turn = 0
        self._probe = Probe()  # the last one
        self._waiting: Batch | None = None  # what the inner search whose turn it is has asked for
        self._scored: dict[Assignment, bool] = {}

    @abstractmethod
    def make(self, space: CompressionSpace) -> Searcher:
        """The inner search at the budget of this space; called in ascending order."""

    @cached_property
    def inner(self) -> list[Searcher]:
        """The inner searches, ascending in budget."""
        made = [self.make(at(self.space, budget)) for budget in marks(self.space, self.budgets - 1)]
        self._spent = [0] * len(made)
        self._numbers: list[dict[int, int]] = [{} for _ in made]
        self._running = list(range(len(made)))
        return made

    def fidelities(self) -> tuple[int | None, ...]:
        return tuple(dict.fromkeys(tokens for each in self.inner for tokens in each.fidelities()))

    def recommended(self) -> list[Assignment]:
        """What each inner search recommends, ascending in cost."""
        found = dict.fromkeys(levels for each in self.inner if (levels := each.recommend()) is not None)
        return sorted(found, key=self.space.cost)

    def front(self) -> list[Assignment]:
        """What each inner search recommends."""
        return self.recommended()

    def recommend(self) -> Assignment | None:
        """The dearest recommendation that was scored, or else the dearest."""
        found = self.recommended()
        return next((a for a in reversed(found) if self._scored.get(a)), found[-1] if found else None)

    # ------------------------------------------------------------------ in turns

    def next_probe(self, allowance: Allowance) -> Probe | None:
        """Lets inner searches ask until one has a probe or a batch that its share pays for."""
        inner = self.inner
        while self._waiting is None and self._running:
            if not self._stays:
                self._turn = min(self._running, key=self._spent.__getitem__)
            searcher, own = inner[self._turn], self._share(allowance)
            probe = searcher.next_probe(own)
            if probe is not None and own.affords(probe.reads, probe.tokens) == probe.reads:
                self._probe = probe
                return probe
            batch = None if probe is not None else searcher.ask(own)
            count = 0 if batch is None else own.affords(len(batch), batch.tokens)
            if batch is None or not count:
                self._running.remove(self._turn)
            elif batch.terms.draw == "same":
                raise InvalidSettingError(
                    "nested minibatches cannot be read in turns: take minibatch 'fresh' or 'fixed'"
                )
            else:
                self._waiting = batch.first(count)
        return None

    @property
    def _stays(self) -> bool:
        """Whether the search whose turn it was reads on what it has just read."""
        pending = getattr(self.inner[self._turn], "pending", None)
        return self._turn in self._running and isinstance(pending, Probe) and pending.draw == "same"

    def _share(self, allowance: Allowance) -> Allowance:
        """What the search whose turn it is may spend: an equal part of all that those running have, less its own."""
        if allowance.tokens is None and allowance.evaluations is None:
            raise InvalidSettingError("seconds cannot be shared out: give a budget of tokens or evaluations")
        spent, own = sum(self._spent[i] for i in self._running), self._spent[self._turn]

        def share(left: int | None) -> int | None:
            return None if left is None else max(0, min(left, -(-(left + spent) // len(self._running)) - own))

        tokens, evaluations = share(allowance.tokens), share(allowance.evaluations)
        self._in_tokens = tokens is not None
        return replace(allowance, tokens=tokens, evaluations=evaluations)

    def learn_sensitivities(self, found: Sensitivities) -> None:
        """Handed to the search that asked."""
        self._spent[self._turn] += found.tokens if self._in_tokens else self._probe.reads
        self.inner[self._turn].learn_sensitivities(found)

    def ask(self, allowance: Allowance) -> Batch | None:
        """The batch of the search whose turn it is, its trials numbered among those of all."""
        if self.next_probe(allowance) is not None:
            raise InvalidSettingError(f"{type(self).__name__} asks for sensitivities: it cannot be run inside another")
        if self._waiting is None:
            self.stop_reason = "the searches at all budgets have ended: " + (self.inner[-1].stop_reason or "spent")
            return None
        numbers, trials = self._numbers[self._turn], list[Trial]()
        for trial in self._waiting:
            numbers[trial.number] = self._asked
            parent = None if trial.parent is None else numbers.get(trial.parent)
            trials.append(self.trial(trial.levels, parent, trial.note))
        return Batch(tuple(trials), self._waiting.terms)

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Handed to the search that asked, with its own numbers."""
        asked, self._waiting = self._waiting, None
        assert asked is not None
        self._spent[self._turn] += sum(o.tokens for o in outcomes) if self._in_tokens else len(outcomes)
        for outcome in outcomes:
            levels = outcome.trial.levels
            self._scored[levels] = self._scored.get(levels, False) or outcome.usable
        self.inner[self._turn].tell([replace(o, trial=t) for o, t in zip(outcomes, asked, strict=False)])
