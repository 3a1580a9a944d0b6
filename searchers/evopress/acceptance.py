"""Acceptance that knows noise: an offspring replaces its parent only where it is better beyond the error."""

from __future__ import annotations

from dataclasses import replace

from evo_hpo.search.procedure import Procedure, Steps
from evo_hpo.search.trial import Batch, Outcome
from searchers.evopress.offspring import Candidate
from searchers.evopress.racing import Differences, Race

Scored = list[tuple[Outcome, Candidate]]
"""Outcomes of the last stage with their candidates, best first."""


class PairedAcceptance:
    """Compares the winner of the last stage with the parent sequence by sequence.

    While the difference is within its error, both are scored on further fresh minibatches like the last stage's, and
    all sequences count together. (A nested minibatch would be charged whole each time it grows.) Whether it has won is
    looked at when 1, 2, 4, ... minibatches are read; it is given up as soon as it is no better on average, or so little
    better that all that may be read would not tell.

    Args:
        doubt: p-value of the one-sided paired test below which the offspring is better; 0.16 is one standard error.
        minibatches: that one decision may read, the last stage's included.
    """

    def __init__(self, doubt: float, minibatches: int) -> None:
        self.doubt = doubt
        self.minibatches = minibatches

    def settle(self, owner: Procedure, scored: Scored, parent: Candidate) -> Steps[Scored]:
        """What is left of the last stage: the parent or the winner; all, where there are no sequences to compare."""
        own = next(((o, c) for o, c in scored if c is parent and o.usable), None)
        if own is None or not scored[0][0].usable:
            return scored
        best, challenger = scored[0]
        if challenger is parent:
            return [own]
        if best.by_sequence is None or own[0].by_sequence is None:
            return scored
        found = Differences.between(best.by_sequence, own[0].by_sequence)
        race, read = Race(self.doubt), 1
        most = found.count * self.minibatches
        while (read & (read - 1) and read < self.minibatches) or not race.won(found):
            if race.hopeless(found, most) or owner.allowance.affords(2, best.terms.tokens) < 2:
                return [own]
            more = yield self._again(owner, own[0], best)
            parts = [o.by_sequence for o in more]
            if len(parts) < 2 or parts[0] is None or parts[1] is None:
                return [own]
            found += Differences.between(parts[1], parts[0])
            read += 1
        return [scored[0]]

    @staticmethod
    def _again(owner: Procedure, own: Outcome, best: Outcome) -> Batch:
        """Parent and winner on a fresh minibatch."""
        trials = [owner.trial(o.trial.levels, o.trial.number, "parent" if o is own else "again") for o in (own, best)]
        return Batch(tuple(trials), replace(best.terms, draw="fresh"))
