"""What journals are replayed into: the interface of a store of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class SearchTracker(Protocol):
    """Takes in the lines of one journal, in order. Not thread-safe.

    Attributes:
        committed: how many lines of the journal are in the store for good.
    """

    committed: int

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """The next lines of the journal; those before ``committed`` only rebuild the running state.

        Raises:
            TrackingError: the store cannot be reached; the same lines may be given again.
        """

    def leave(self, *, running: bool) -> None:
        """Nothing more comes for now: a search that neither ended nor runs is marked as interrupted."""


class Tracker(Protocol):
    """A store of runs that journals are replayed into."""

    def search(self, header: Mapping[str, Any]) -> SearchTracker:
        """The tracker of one search, found again if it was tracked before."""
