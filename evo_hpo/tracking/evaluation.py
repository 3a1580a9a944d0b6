"""A final evaluation in MLflow: a run a model in the comparison's experiment, and the table at the searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evo_hpo.record.comparison import Comparison
from evo_hpo.tracking.runs import LONGEST_NAME, LONGEST_PARAM, LONGEST_TAG, safe_key, shown


def upload_evaluation(folder: Path, uri: str, evaluation: Mapping[str, Any], files: Sequence[Path]) -> None:
    """See :func:`evo_hpo.tracking.log_evaluation`."""
    from evo_hpo.tracking.mlflow_tracker import MlflowTracker, experiment_name

    tracker = MlflowTracker(uri, experiment_name(folder))
    headers = {record.search: record.header for record in Comparison.read(folder).records()}
    for row in evaluation["results"]:
        name = str(row["name"]).replace("'", "")
        given = {"spec": row["spec"], "search": row["search"], **evaluation["protocol"]}
        params = {key: shown(str(value), LONGEST_PARAM, "evaluation.json") for key, value in given.items() if value}
        run = tracker.own_run(
            shown(f"evaluation {name}", LONGEST_NAME, "evaluation.json"),
            {"kind": "evaluation", "model": shown(name, LONGEST_TAG, "evaluation.json")},
            params,
        )
        tracker.log_own(
            run,
            params=params,
            metrics=_metrics(row),
            tags={},
            files=files,
            folders=[],
        )
        if row["search"] in headers:
            tracker.attach(headers[row["search"]], files, folder="evaluation")


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    size = row["bytes"]
    found = {"bytes": float(size), "bits_a_weight": 8 * size / row["weights"]} if size else {}
    for text, figures in row["texts"].items():
        for what, estimate in figures.items():
            for end, value in (estimate or {}).items():
                if value is not None:
                    found[safe_key(f"{text}/{what}" if end == "mean" else f"{text}/{what}_{end}")] = float(value)
    return found | {safe_key(f"tasks/{key}"): value for key, value in row["tasks"].items() if value is not None}
