"""What the searchers have in common that are other libraries' optimizers: encoding, start, batches, what is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.budget import Allowance
from evo_hpo.search.searcher import Searcher, boolean, draw, number, positive
from evo_hpo.search.trial import Batch, Outcome
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.foreign.encoding import Decoded, Encoding, make_encoding

__all__ = ["ForeignSearcher"]


class ForeignSearcher(Searcher):
    """An optimizer of another library on a compression space.

    Args:
        encoding: how proposals become feasible (see ``encoding.py``); None: the optimizer's measured default.
        batch: trials a batch; None: what fits the optimizer.
        tokens: calibration tokens a trial; None: the problem's default.
        minibatch: ``fixed`` (all trials comparable), or ``fresh`` for each batch (the incumbent is scored again in it,
            which the optimizer is not told).
        start: ``uniform`` scores the uniform assignment first and tells the optimizer; ``none`` leaves it alone.
        fill: spend what a proposal leaves of the budget (encodings repaired, projection, native and its kin).
        penalty: encoding ``penalty``: loss added for an excess as large as the budget, as a multiple of the loss.
    """

    encodings: ClassVar[tuple[str, ...]] = ()
    default_encoding: ClassVar[str] = "repaired"
    two_level_encoding: ClassVar[str | None] = None
    """Default where units have two levels only, dropped or kept; None: the same."""
    default_batch: ClassVar[int] = 1

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        encoding: str | None = None,
        batch: int | None = None,
        tokens: int | None = None,
        minibatch: str = "fixed",
        start: str = "uniform",
        fill: bool = True,
        penalty: float = 10.0,
    ) -> None:
        super().__init__(space, seed=seed)
        self.batch = positive("batch", self.default_batch if batch is None else batch)
        self.tokens = tokens if tokens is None else positive("tokens", tokens)
        self.minibatch = draw("minibatch", minibatch)
        if start not in ("uniform", "none"):
            raise InvalidSettingError(f"start={start!r} must be one of: uniform, none")
        self.start = start
        self.penalty = number("penalty", penalty, zero=True)
        default = (self.two_level_encoding if space.two_levels else None) or self.default_encoding
        streams = np.random.SeedSequence(seed).spawn(2)
        self.encoding: Encoding = make_encoding(
            default if encoding is None else encoding,
            space,
            np.random.default_rng(streams[0]),
            fill=boolean("fill", fill),
            allowed=self.encodings,
        )
        self._library_seed = int(streams[1].generate_state(1)[0] >> 1)
        self._incumbent: Assignment | None = None
        self._again: tuple[Assignment, ...] = ()

    def _count(self, allowance: Allowance) -> int:
        """Proposals of the next batch; the first is only the start, for all others to learn from."""
        if self.start == "uniform" and not self._asked:
            return 1
        self._again = () if self.minibatch == "fixed" or self._incumbent is None else (self._incumbent,)
        again = len(self._again)
        return max(1, allowance.affords(self.batch + again, self.tokens)) - again

    def _only(self) -> Batch | None:
        """Where no unit may change: the one assignment, then the end."""
        self.stop_reason = "the space has one assignment"
        return None if self._asked else self._batch([self._start()])

    def _batch(self, proposals: Iterable[Decoded]) -> Batch:
        """The proposals, behind the incumbent where the minibatch is fresh."""
        levels = (*self._again, *(decoded.levels for decoded in proposals))
        return self.propose(levels, tokens=self.tokens, draw=self.minibatch)

    def fidelities(self) -> tuple[int | None, ...]:
        """The one."""
        return (self.tokens,)

    def _start(self) -> Decoded:
        """The uniform assignment and its point."""
        levels = self.space.uniform()
        return Decoded(levels, self.encoding.encode(levels))

    def _loss(self, outcome: Outcome, decoded: Decoded) -> float:
        """The loss that the optimizer is told."""
        if self.encoding.name == "penalty":
            return outcome.loss + self.penalty * decoded.excess * max(abs(outcome.loss), 1e-12)
        return outcome.loss

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Remembers the best; the optimizer's own share, :meth:`_proposed`, is the subclass's."""
        self.remember(outcomes)
        usable = [o for o in outcomes if o.usable]
        if usable:
            self._incumbent = min(usable, key=lambda o: o.loss).trial.levels

    def _proposed(self, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """The outcomes of the optimizer's own proposals."""
        return outcomes[len(self._again) :]

    def recommend(self) -> Assignment | None:
        """The best on the fixed minibatch; on fresh ones, where losses do not compare, the last batch's best."""
        return super().recommend() if self.minibatch == "fixed" else self._incumbent
