"""What the searchers have in common that are other libraries' optimizers: encoding, start, batches, what is told."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.procedure import Sampling
from evo_hpo.search.searcher import boolean, number, one_of
from evo_hpo.search.trial import Outcome
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from evo_hpo.space.ranges import uniform_at
from searchers.foreign.encoding import Decoded, Encoding, make_encoding

STARTS = 4
"""Steps between the starts over a range of budgets."""


class ForeignSearcher(Sampling):
    """An optimizer of another library on a compression space.

    Over a range of budgets it has two objectives, cost and loss: nothing is filled, only what lies outside of the range
    is repaired, and the start is uniform compression at five budgets.

    Args:
        encoding: how proposals become feasible (see ``encoding.py``); None: the optimizer's measured default.
        batch: trials a batch; None: what fits the optimizer.
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
    ranged_encoding: ClassVar[str] = "projection"
    """Default over a range of budgets."""
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
        batch = self.default_batch if batch is None else batch
        super().__init__(space, seed=seed, batch=batch, tokens=tokens, minibatch=minibatch)
        self.start = one_of("start", start, "uniform", "none")
        self.penalty = number("penalty", penalty, zero=True)
        default = (self.two_level_encoding if space.two_levels else None) or self.default_encoding
        default = self.ranged_encoding if space.ranged else default
        if space.ranged and encoding == "keys":
            raise InvalidSettingError("encoding='keys' spends the whole budget: over a range take 'projection'")
        found = uniform_at(space, STARTS) if space.ranged else ()
        self._starts: tuple[Assignment, ...] = tuple(found) or (space.uniform(),)
        streams = np.random.SeedSequence(seed).spawn(2)
        self.encoding: Encoding = make_encoding(
            default if encoding is None else encoding,
            space,
            np.random.default_rng(streams[0]),
            fill=boolean("fill", fill) and not space.ranged,
            allowed=self.encodings,
        )
        self._library_seed = int(streams[1].generate_state(1)[0] >> 1)

    def sample(self, count: int) -> list[Assignment] | None:
        """The optimizer's proposals; the first batch is only the start, for all others to learn from."""
        if not self.encoding.free:
            self.stop_reason = "the space has one assignment"
            return None if self._asked else [self.space.uniform()]
        first = len(self._starts) - self._asked if self.start == "uniform" else 0
        proposals = self.proposals(min(first, count) if first > 0 else count)
        return None if proposals is None else [decoded.levels for decoded in proposals]

    @abstractmethod
    def proposals(self, count: int) -> list[Decoded] | None:
        """The optimizer's next ``count`` proposals; None ends the search."""

    def _start(self, number: int = 0) -> Decoded:
        """A start and its point."""
        levels = self._starts[number]
        return Decoded(levels, self.encoding.encode(levels))

    def _loss(self, outcome: Outcome, decoded: Decoded) -> float:
        """The loss that the optimizer is told."""
        if self.encoding.name == "penalty":
            return outcome.loss + self.penalty * decoded.excess * max(abs(outcome.loss), 1e-12)
        return outcome.loss

    def _objectives(self, levels: Assignment, loss: float) -> float | list[float]:
        """What the optimizer is to make small: the loss, or over a range of budgets cost and loss."""
        return [float(self.space.cost(levels)), loss] if self.space.ranged else loss
