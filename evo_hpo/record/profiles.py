"""Compression profiles: what a search recommends, as a file that says all that is needed to rebuild the model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from evo_hpo.errors import PlanError
from evo_hpo.record.journal import read_journal
from evo_hpo.space.compression_space import Assignment, CompressionSpace

__all__ = ["read_profile", "write_profiles"]


def write_profiles(folder: Path) -> list[Path]:
    """Writes ``profiles/<search>.json`` for each search that has a final checkpoint, and ``winner.json``.

    The winner of each problem has the least held-out loss; with several problems there is ``winner-<problem>.json``.
    """
    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    target = folder / "profiles"
    written: list[Path] = []
    best: dict[str, dict[str, Any]] = {}
    for entry in comparison["searches"]:
        journal = folder / entry["journal"]
        if entry["problem"] not in comparison["problems"] or not journal.exists():
            continue
        record = read_journal(journal)
        final = [c for c in record.checkpoints if c.fraction == 1.0]
        if not final:
            continue
        space = CompressionSpace.from_json(comparison["problems"][entry["problem"]]["space"])
        problem = next(p for p in comparison["plan"]["problems"] if (p.get("label") or p["name"]) == entry["problem"])
        profile = {
            "search": entry["id"],
            "searcher": entry["searcher"],
            "settings": entry["settings"],
            "seed": entry["seed"],
            "problem": problem,
            "fingerprint": comparison["problems"][entry["problem"]]["fingerprint"],
            "held_out": final[-1].held_out,
            "cost": space.cost(final[-1].levels),
            "average": space.average(final[-1].levels),
            "levels": list(final[-1].levels),
            "units": space.labels(final[-1].levels),
        }
        target.mkdir(exist_ok=True)
        written.append(_write(target / f"{entry['id']}.json", profile))
        rival = best.get(entry["problem"])
        if rival is None or profile["held_out"]["loss"] < rival["held_out"]["loss"]:
            best[entry["problem"]] = profile
    for key, profile in best.items():
        name = "winner.json" if len(comparison["plan"]["problems"]) == 1 else f"winner-{key.replace('/', '-')}.json"
        written.append(_write(target / name, profile))
    return written


def _write(path: Path, profile: dict[str, Any]) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(profile, indent=1), encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_profile(path: Path, space: CompressionSpace | None = None) -> tuple[dict[str, Any], Assignment]:
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
