"""What the searchers have in common that are other libraries' optimizers: encoding, start, batches, what is told."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from evo_hpo.search.procedure import Sampling
from evo_hpo.search.searcher import boolean, number, one_of
from evo_hpo.search.trial import Outcome
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.foreign.encoding import Decoded, Encoding, make_encoding

__all__ = ["ForeignSearcher"]


class ForeignSearcher(Sampling):
    """An optimizer of another library on a compression space.

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
        streams = np.random.SeedSequence(seed).spawn(2)
        self.encoding: Encoding = make_encoding(
            default if encoding is None else encoding,
            space,
            np.random.default_rng(streams[0]),
            fill=boolean("fill", fill),
            allowed=self.encodings,
        )
        self._library_seed = int(streams[1].generate_state(1)[0] >> 1)

    def sample(self, count: int) -> list[Assignment] | None:
        """The optimizer's proposals; the first batch is only the start, for all others to learn from."""
        if not self.encoding.free:
            self.stop_reason = "the space has one assignment"
            return None if self._asked else [self.space.uniform()]
        first = self.start == "uniform" and not self._asked
        proposals = self.proposals(1 if first else count)
        return None if proposals is None else [decoded.levels for decoded in proposals]

    @abstractmethod
    def proposals(self, count: int) -> list[Decoded] | None:
        """The optimizer's next ``count`` proposals; None ends the search."""

    def _start(self) -> Decoded:
        """The uniform assignment and its point."""
        levels = self.space.uniform()
        return Decoded(levels, self.encoding.encode(levels))

    def _loss(self, outcome: Outcome, decoded: Decoded) -> float:
        """The loss that the optimizer is told."""
        if self.encoding.name == "penalty":
            return outcome.loss + self.penalty * decoded.excess * max(abs(outcome.loss), 1e-12)
        return outcome.loss
