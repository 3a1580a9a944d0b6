"""Compression profiles: what a search recommends, as a file that says all that is needed to rebuild the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evo_hpo.errors import PlanError
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from evo_hpo.space.unit import integer


def open_profile(path: Path, space: CompressionSpace | None = None) -> tuple[dict[str, Any], Assignment]:
    """A profile file and its assignment, checked against ``space`` where one is given.

    Raises:
        PlanError: no such file, or not a profile.
        InvalidSpaceError: units or levels that the space does not have.
    """
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
        levels = tuple(map(integer, profile["levels"]))
        _refuse_other_shape(profile)
    except FileNotFoundError:
        raise PlanError(f"no profile at {path}: a finished comparison keeps them under profiles/") from None
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}; name a file under a comparison's profiles/") from None
    except KeyError as error:
        raise PlanError(f"{path} is not a profile: it has no {error}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not a profile: {error}") from None
    return profile, levels if space is None else space.from_labels(profile["units"])


def _refuse_other_shape(profile: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError where what is read of a profile is missing or of another kind."""
    problem, held_out = profile["problem"], profile["held_out"]
    float(profile["average"]), float(held_out["loss"])
    for what, value, kind in (
        ("problem", problem, dict),
        ("the problem's name", problem["name"], str),
        ("the problem's settings", problem.get("settings", {}), dict),
        ("units", profile["units"], dict),
        ("fingerprint", profile.get("fingerprint") or {}, dict),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{what} is {value!r:.60}")
