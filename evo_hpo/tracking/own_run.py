"""A comparison's own run (plan, report, pictures, profiles, environment), its saved views and its banner."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evo_hpo.errors import JournalError, PlanError
from evo_hpo.record.changes import flat
from evo_hpo.record.comparison import CHANGES_NO_RESULT, Comparison
from evo_hpo.record.fronts import judged
from evo_hpo.record.records import SearchRecord, read_journals
from evo_hpo.search.checkpoint import losses_by_text
from evo_hpo.tracking.runs import LONGEST_NAME, LONGEST_PARAM, safe_key, shown
from evo_hpo.tracking.views import note, views

Winners = Mapping[str, Mapping[str, Any]]
"""Problem -> profile of its winner."""


def upload(folder: Path, uri: str) -> str:
    """See :func:`evo_hpo.tracking.log_comparison`."""
    from evo_hpo.tracking.mlflow_tracker import MlflowTracker, experiment_name

    tracker = MlflowTracker(uri, experiment_name(folder))
    name = folder.resolve().name
    try:
        comparison = Comparison.read(folder)
    except PlanError:
        comparison = Comparison(folder)
    records = comparison.records() or _unplanned(folder)
    winners = comparison.winning_profiles()
    of_fronts = {
        record.search: _mean_losses(record)
        for record in judged(comparison.problems, records)[1]
        if record.finished
        and record.problem in comparison.problems
        and comparison.problems[record.problem].space.ranged
    }
    details = _details(comparison, records, winners, of_fronts)
    files, folders = comparison.documents()
    plan = {k: v for k, v in comparison.plan.items() if v not in (None, [], {})}
    described = flat(plan, "plan") if plan else {}
    params = {safe_key(k): shown(v, LONGEST_PARAM, "comparison.json") for k, v in described.items()}
    run = tracker.own_run(
        shown(f"{name} comparison", LONGEST_NAME, "comparison.json"),
        {"kind": "comparison"},
        params,
        [f"plan/{key}" for key in CHANGES_NO_RESULT],
    )
    tracker.log_own(
        run,
        params=params,
        metrics=_winner_metrics(winners),
        tags={"mlflow.note.content": "\n".join(f"- {k}: {v}" for k, v in details.items())},
        files=files,
        folders=folders,
    )
    for record in records:
        fronts = [comparison.folder / "fronts" / f"{record.search}.{kind}" for kind in ("csv", "json")]
        files = [file for file in (comparison.sensitivities_picture(record.search), *fronts) if file.is_file()]
        tracker.attach(record.header, files, of_fronts.get(record.search))
    made = views(records)
    tracker.tag_experiment(
        {v.tag: v.value() for v in made} | {"mlflow.note.content": note(tracker.experiment, name, made, details)}
    )
    return run


def _mean_losses(record: SearchRecord) -> dict[str, float]:
    """Mean loss of a search over all budgets of its range, on each text; of a search as it is judged."""
    figures = record.checkpoints[-1].held_out if record.checkpoints else {}
    means = losses_by_text(figures).items()
    return {safe_key("/".join(filter(None, ("front", k, "mean_loss")))): v for k, v in means if math.isfinite(v)}


def _unplanned(folder: Path) -> list[SearchRecord]:
    """The journals of a folder whose record names none of them."""
    try:
        return read_journals(folder)
    except JournalError:
        return []


def _winner_metrics(winners: Winners) -> dict[str, float]:
    """Held-out figures of the winner, under the problem's name where there are several."""
    return {
        safe_key(f"held_out/{problem}/{k}" if len(winners) > 1 else f"held_out/{k}"): float(v)
        for problem, profile in winners.items()
        for k, v in (profile.get("held_out") or {}).items()
    }


def _details(
    comparison: Comparison,
    records: Sequence[SearchRecord],
    winners: Winners,
    of_fronts: Mapping[str, Mapping[str, float]],
) -> dict[str, str]:
    finished = sum(r.finished for r in records)
    details = {
        "searches": f"{finished} of {len(comparison.searches or records)} finished",
        "trials": f"{sum(len(r.outcomes) for r in records)}",
    }
    budgets = {json.dumps(r.header.get("budget")) for r in records}
    if len(budgets) == 1:
        details["budget of each search"] = ", ".join(f"{v} {k}" for k, v in json.loads(budgets.pop()).items())
    for problem, profile in winners.items():
        held_out = profile.get("held_out") or {}
        parts: dict[str, float | None] = {
            f"on {k}" if k else "held-out loss": v for k, v in losses_by_text(held_out).items()
        }
        if means := of_fronts.get(str(profile.get("search"))):
            parts = {"mean held-out loss over the range": means.get("front/mean_loss")}
        figure = "".join(f", {name} {loss:.6g}" for name, loss in parts.items() if loss is not None)
        details[f"winner on {problem}" if len(winners) > 1 else "winner"] = f"{profile.get('search')}{figure}"
    details["folder"] = f"`{comparison.folder.resolve()}`"
    return details
