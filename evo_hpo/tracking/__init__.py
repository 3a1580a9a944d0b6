"""From journals to a tracking store. Nothing here imports MLflow before it is needed.

The journal is the truth; tracking only copies it, can be repeated at any time, and can neither stop nor change a
search.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evo_hpo.tracking.background import BackgroundTracker
from evo_hpo.tracking.location import default_uri, quiet_environment
from evo_hpo.tracking.tracker import SearchTracker, Tracker
from evo_hpo.tracking.ui import launch_ui

__all__ = [
    "BackgroundTracker",
    "SearchTracker",
    "Tracker",
    "default_uri",
    "launch_ui",
    "log_comparison",
    "log_evaluation",
    "track",
]

os.environ.update(quiet_environment())  # here, so that it is done before any module of this package imports MLflow


def track(folder: Path | str, tracking_uri: str | None = None) -> int:
    """Replays the journals of a comparison's folder, or one journal, into MLflow; what is there is not written again.

    Args:
        folder: a comparison's folder or a journal.
        tracking_uri: where to; default: :func:`default_uri`.

    Returns:
        The number of journal lines that were new.

    Raises:
        TrackingError: the store cannot be used.
        JournalError: no journals, or a damaged one.
    """
    from evo_hpo.tracking.writer import replay

    return replay(Path(folder), tracking_uri or default_uri(folder))


def log_comparison(folder: Path | str, tracking_uri: str | None = None) -> str:
    """Uploads a comparison's plan, report, profiles and environment to its own run, and writes the saved views.

    Returns:
        The id of the comparison's run.

    Raises:
        TrackingError: the store cannot be used.
    """
    from evo_hpo.tracking.own_run import upload

    return upload(Path(folder), tracking_uri or default_uri(folder))


def log_evaluation(
    folder: Path | str, evaluation: Mapping[str, Any], files: Sequence[Path], tracking_uri: str | None = None
) -> None:
    """Uploads a final evaluation beside the searches of a comparison: a run a model, and its files.

    Args:
        evaluation: as ``Evaluation.to_json`` gives it.
        files: table and picture; they are attached to the searches that found the profiles too.

    Raises:
        TrackingError: the store cannot be used.
    """
    from evo_hpo.tracking.evaluation import upload_evaluation

    upload_evaluation(Path(folder), tracking_uri or default_uri(folder), evaluation, files)
