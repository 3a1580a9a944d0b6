"""From journals to a tracking store. Nothing here imports MLflow before it is needed.

The journal is the truth; tracking only copies it, can be repeated at any time, and can neither stop nor change a
search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from evo_hpo.tracking.background import BackgroundTracker
from evo_hpo.tracking.store import default_uri
from evo_hpo.tracking.ui import launch_ui

__all__ = [
    "BackgroundTracker",
    "SearchTracker",
    "Tracker",
    "default_uri",
    "launch_ui",
    "log_comparison",
    "track",
]


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

    def close(self) -> None:
        """Lets go of the store."""


def track(folder: Path | str, tracking_uri: str | None = None, follow: bool = False) -> int:
    """Replays the journals of a comparison's folder, or one journal, into MLflow; what is there is not written again.

    Args:
        folder: a comparison's folder or a journal.
        tracking_uri: where to; default: :func:`default_uri`.
        follow: goes on until interrupted, as journals grow.

    Returns:
        The number of journal lines that were new.

    Raises:
        TrackingError: the store cannot be used.
        JournalError: no journals, or a damaged one.
    """
    from evo_hpo.tracking.writer import replay

    return replay(Path(folder), tracking_uri or default_uri(folder), follow=follow)


def log_comparison(folder: Path | str, tracking_uri: str | None = None) -> str:
    """Uploads a comparison's plan, report, profiles and environment to its own run, and writes the saved views.

    Returns:
        The id of the comparison's run.

    Raises:
        TrackingError: the store cannot be used.
    """
    from evo_hpo.tracking.comparison import upload

    return upload(Path(folder), tracking_uri or default_uri(folder))
