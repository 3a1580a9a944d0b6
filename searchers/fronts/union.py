"""Searches at single budgets put together: what a search over a whole range has to beat."""

from __future__ import annotations

from typing import Any, ClassVar

from evo_hpo.search.searcher import Searcher
from evo_hpo.space.compression_space import CompressionSpace
from searchers.fronts.interleaved import Interleaved
from searchers.wrapping import WrappingFamily

MEMBERS = ("curvature_region", "evopress", "fisher", "local_search", "trust_region")


class Union(Interleaved):
    """Runs another searcher at each of several budgets, in turns, on equal shares; nothing is shared between them.

    Args:
        budgets: how many, evenly spaced over the range, both ends among them.
        settings: the inner searcher's own.
    """

    wrapped: ClassVar[type[Searcher]]

    def __init__(self, space: CompressionSpace, *, seed: int = 0, budgets: int = 5, **settings: Any) -> None:
        super().__init__(space, seed=seed, budgets=budgets)
        self._settings = settings
        self.asks_for_sensitivities = self.inner[-1].asks_for_sensitivities

    def make(self, space: CompressionSpace) -> Searcher:
        return self.wrapped(space, seed=int(self.rng.integers(2**31)), **self._settings)


family = WrappingFamily(
    "union", Union, ("budgets",), "{} at several budgets of a range, in turns, on equal shares of the purse.", MEMBERS
)
"""The entry point."""
