"""A comparison's own run (plan, report, pictures, profiles, environment), its saved views and its banner."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evo_hpo.errors import JournalError
from evo_hpo.record.records import SearchRecord, read_journals
from evo_hpo.tracking.runs import LONGEST_NAME, flat, safe_key, shown
from evo_hpo.tracking.views import note, views

if TYPE_CHECKING:
    pass

__all__ = ["upload"]

FILES = ("plan.toml", "comparison.json", "errors.log")
FOLDERS = ("report", "profiles")


def upload(folder: Path, uri: str) -> str:
    """See :func:`evo_hpo.tracking.log_comparison`."""
    from evo_hpo.tracking.mlflow_tracker import MlflowTracker, experiment_name

    tracker = MlflowTracker(uri, experiment_name(folder))
    name = folder.resolve().name
    try:
        records = read_journals(folder)
    except JournalError:
        records = []
    comparison = _comparison(folder)
    details = _details(folder, comparison, records)
    run = tracker.own_run(shown(f"{name} comparison", LONGEST_NAME, "comparison.json"), {"kind": "comparison"})
    tracker.log_own(
        run,
        params={k: shown(v, 6000, "comparison.json") for k, v in _params(comparison).items()},
        metrics=_winner_metrics(folder),
        tags={"mlflow.note.content": "\n".join(f"- {k}: {v}" for k, v in details.items())},
        files=[folder / f for f in FILES if (folder / f).is_file()],
        folders=[folder / f for f in FOLDERS if (folder / f).is_dir()],
    )
    made = views(records)
    tracker.tag_experiment(
        {v.tag: v.value() for v in made} | {"mlflow.note.content": note(tracker.experiment, name, made, details)}
    )
    return run


def _comparison(folder: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        return data
    except (OSError, ValueError):
        return {}


def _params(comparison: Mapping[str, Any]) -> dict[str, Any]:
    plan = {k: v for k, v in (comparison.get("plan") or {}).items() if v not in (None, [], {})}
    return {safe_key(k): v for k, v in flat(plan, "plan").items()} if plan else {}


def _winner(folder: Path) -> dict[str, Any]:
    for path in sorted((folder / "profiles").glob("winner*.json")):
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return data
        except ValueError:
            continue
    return {}


def _winner_metrics(folder: Path) -> dict[str, float]:
    held_out = _winner(folder).get("held_out") or {}
    return {safe_key(f"held_out/{k}"): float(v) for k, v in held_out.items()}


def _details(folder: Path, comparison: Mapping[str, Any], records: Sequence[SearchRecord]) -> dict[str, str]:
    """Facts for the banner."""
    finished = sum(r.finished for r in records)
    details = {
        "searches": f"{finished} of {len(comparison.get('searches') or records)} finished",
        "trials": f"{sum(len(r.outcomes) for r in records)}",
    }
    budgets = {json.dumps(r.header.get("budget")) for r in records}
    if len(budgets) == 1:
        details["budget of each search"] = ", ".join(f"{v} {k}" for k, v in json.loads(budgets.pop()).items())
    winner = _winner(folder)
    if winner:
        loss = winner.get("held_out", {}).get("loss")
        details["winner"] = f"{winner.get('search')}, held-out loss {loss:.6g}" if loss is not None else str(winner)
    details["folder"] = f"`{folder.resolve()}`"
    return details
