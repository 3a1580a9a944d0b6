"""Compression profiles: what a search recommends, as a file that says all that is needed to rebuild the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evo_hpo.errors import PlanError
from evo_hpo.space.compression_space import Assignment, CompressionSpace

__all__ = ["open_profile"]


def open_profile(path: Path, space: CompressionSpace | None = None) -> tuple[dict[str, Any], Assignment]:
    """A profile file and its assignment, checked against ``space`` where one is given.

    Raises:
        PlanError: no such file, or not a profile.
        InvalidSpaceError: units or levels that the space does not have.
    """
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
        levels = tuple(map(int, profile["levels"]))
    except FileNotFoundError:
        raise PlanError(f"no profile at {path}: a finished comparison keeps them under profiles/") from None
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{path} is not a profile: {error}") from None
    return profile, levels if space is None else space.from_labels(profile["units"])
