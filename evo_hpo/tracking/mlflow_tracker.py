"""Searches as MLflow runs: a parent run a search, a child run a trial. The only module that imports MLflow.

Every write can be repeated. Lines of a journal are written in chunks; a chunk is committed when the parent's tag
``evo_hpo.committed`` counts its lines. After a crash the open chunk is written again: its children are found by their
tag ``chunk``, finished ones are skipped, running ones are completed, and equal metric points are one point.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evo_hpo.errors import TrackingError
from evo_hpo.records import decode_checkpoint, decode_levels, decode_outcome, encode_levels
from evo_hpo.space import CompressionSpace
from evo_hpo.tracking.store import artifact_root, experiment_location, prepare_store, quiet_environment
from evo_hpo.trial import Outcome

os.environ.update(quiet_environment())

import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from sqlalchemy import event

__all__ = ["MlflowSearch", "MlflowTracker", "create_schema", "safe_key"]

COMMITTED = "evo_hpo.committed"
KEY = "evo_hpo.key"
UNITS_SHOWN = 40
"""Spaces of at most this many units have a parameter for each unit on every trial; larger ones only ``levels``."""

LONGEST_PARAM = 6000
LONGEST_TAG = 8000
LONGEST_NAME = 250
METRICS_A_CALL = 1000
PARAMS_A_CALL = 100

for noisy in ("mlflow", "alembic"):
    logging.getLogger(noisy).setLevel(logging.WARNING)


@event.listens_for(sqlalchemy.engine.Engine, "connect")
def _sqlite_settings(connection: Any, _: Any) -> None:
    """In WAL mode, NORMAL survives a killed process; a power cut loses last commits only, and the journal has them."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=NORMAL")


def create_schema(uri: str, artifacts: str) -> None:
    """Makes the tables of an empty SQL database."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(uri, artifacts)  # type: ignore[no-untyped-call]
    store._dispose_engine()  # type: ignore[no-untyped-call]


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turns what MLflow and the database raise into TrackingError."""
    try:
        yield
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrackingError(f"{doing}: {first}") from error


def connect(uri: str) -> MlflowClient:
    """A client of a store, which is created if it is an SQLite file that does not exist.

    Raises:
        TrackingError: it cannot be used.
    """
    with translated(f"tracking store {uri}"):
        prepare_store(uri)
        artifacts = artifact_root(uri)
        if artifacts is not None:  # or else the client makes ./mlruns wherever it stands
            os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = artifacts
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


def safe_key(name: str) -> str:
    """``name`` as a key that MLflow takes; changed names end in a hash, so that two never become one."""
    if (
        re.fullmatch(r"[\w. /-]{1,200}", name, re.ASCII)
        and ".." not in name
        and not re.search(r"^[./]|[./]$|//|\./", name)
    ):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return re.sub(r"[^\w-]+", "_", name, flags=re.ASCII).strip("_")[:180] + f"-{digest}"


def shown(value: Any, limit: int, where: str) -> str:
    """``value`` as text of at most ``limit`` characters; a longer one says so and where it is whole."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text.encode("utf-8", "replace").decode()
    if len(text) <= limit:
        return text
    note = f"... ({len(text)} characters, whole in {where})"
    return text[: limit - len(note)] + note


def flat(value: Any, prefix: str) -> dict[str, Any]:
    """Nested settings as ``prefix/key/key``."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}/{key}").items()}
    return {prefix: value}


class MlflowTracker:
    """The searches of one comparison in one experiment.

    Args:
        uri: tracking URI.
        experiment: name of the experiment; created if it does not exist.

    Raises:
        TrackingError: the store cannot be used, or the name cannot be an experiment's.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        if not experiment.strip() or len(experiment) > LONGEST_NAME:
            raise TrackingError(
                f"experiment name {experiment[:60]!r} has {len(experiment)} characters, allowed 1 to {LONGEST_NAME}:"
                " rename the comparison"
            )
        self.uri = uri
        self.client = connect(uri)
        self.experiment = self._experiment(experiment)

    def _experiment(self, name: str) -> str:
        with translated(f"experiment {name!r}"):
            known = self.client.get_experiment_by_name(name)
            if known is None:
                try:
                    return str(self.client.create_experiment(name, experiment_location(self.uri, name)))
                except MlflowException:  # another process was faster
                    known = self.client.get_experiment_by_name(name)
                    if known is None:
                        raise
        if known.lifecycle_stage != "active":
            raise TrackingError(
                f"experiment {name!r} was deleted in MLflow: restore it with `mlflow experiments restore"
                f" --experiment-id {known.experiment_id}`, or rename the comparison"
            )
        return str(known.experiment_id)

    def search(self, header: Mapping[str, Any]) -> MlflowSearch:
        """The parent run of a search: found by the hash of its header, else created."""
        return MlflowSearch(self.client, self.experiment, header)

    def close(self) -> None:
        """Nothing is held open."""


class MlflowSearch:
    """One search as a parent run with a child run a trial.

    Attributes:
        run_id: of the parent.
        committed: lines of the journal (the header is one) that are in the store for good.
    """

    def __init__(self, client: MlflowClient, experiment: str, header: Mapping[str, Any]) -> None:
        self.client = client
        self.experiment = experiment
        self.header = header
        self.search = str(header["search"])
        self.name = re.sub(r"-s(\d+)$", r" s\1", self.search)
        described = header.get("space")
        self.space = None if described is None else CompressionSpace.from_json(described)
        self.unit_keys = [safe_key(f"unit/{u.name}") for u in self.space.units] if self.space else []
        self.seen = 0
        self.trials = 0
        self.tokens = 0
        self.best: tuple[int, float] | None = None
        with translated(f"search {self.search}"):
            self.run_id, self.committed, self.status = self._open()

    # ------------------------------------------------------------------ parent

    def _open(self) -> tuple[str, int, str]:
        text = json.dumps(self.header, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        runs = self.client.search_runs(
            [self.experiment], f"tags.`{KEY}` = '{key}'", ViewType.ACTIVE_ONLY, max_results=1
        )
        if runs:
            run = runs[0]
            return run.info.run_id, int(run.data.tags.get(COMMITTED, 0)), str(run.info.status)
        tags = {
            KEY: key,
            "kind": "search",
            "search": self.search,
            "searcher": str(self.header.get("searcher", "")),
            "label": str(self.header.get("label") or self.header.get("searcher", "")),
            "seed": str(self.header.get("seed", "")),
            "problem": str(self.header.get("problem", "")),
        }
        commit = (self.header.get("git") or {}).get("commit")
        if commit:
            tags["mlflow.source.git.commit"] = commit
        run = self.client.create_run(
            self.experiment,
            start_time=_milliseconds(self.header.get("created")),
            tags={k: shown(v, LONGEST_TAG, "header.json") for k, v in tags.items()},
            run_name=shown(self.name, LONGEST_NAME, "header.json"),
        )
        return run.info.run_id, 0, "RUNNING"

    def _log_header(self) -> None:
        self.client.log_dict(self.run_id, dict(self.header), "header.json")
        settings = {
            "searcher": self.header.get("searcher"),
            "label": self.header.get("label"),
            "seed": self.header.get("seed"),
            "problem": self.header.get("problem"),
            "minibatch_seed": self.header.get("minibatch_seed"),
            "units": len(self.unit_keys) or None,
            **flat(self.header.get("budget") or {}, "budget"),
            **flat(self.header.get("settings") or {}, "settings"),
            **flat(self.header.get("fingerprint") or {}, "fingerprint"),
            **flat(self.header.get("versions") or {}, "versions"),
        }
        params = [
            Param(safe_key(k), shown(v, LONGEST_PARAM, "header.json"))
            for k, v in settings.items()
            if v not in (None, {})
        ]
        for at in range(0, len(params), PARAMS_A_CALL):
            self.client.log_batch(self.run_id, params=params[at : at + PARAMS_A_CALL])

    # ------------------------------------------------------------------ lines

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """The next lines of the journal, as one chunk; can be given again when it raises.

        Raises:
            TrackingError: the store cannot be reached.
        """
        state = self.seen, self.trials, self.tokens, self.best
        try:
            with translated(f"search {self.search}"):
                self._log(lines)
        except BaseException:
            self.seen, self.trials, self.tokens, self.best = state
            raise

    def _log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        metrics: list[Metric] = []
        fresh = self.seen + len(lines) > self.committed
        known = self._children() if fresh and self.committed else {}
        if fresh and self.status != "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
            self.status = "RUNNING"
        end: Mapping[str, Any] | None = None
        for line in lines:
            new = self.seen >= self.committed
            kind = line["kind"]
            if kind == "header" and new:
                self._log_header()
                known = self._children()
            elif kind == "outcome":
                outcome = decode_outcome(line)
                points = self._take(outcome, _milliseconds(line["time"]))
                if new:
                    metrics += points
                    self._child(outcome, _milliseconds(line["time"]), known.get(str(outcome.trial.number)))
            elif kind == "checkpoint" and new:
                metrics += self._checkpoint(line)
            elif kind == "end":
                end = line
            self.seen += 1
        if fresh:
            self._commit(metrics, end)
        if end is not None and self.status != "FINISHED":
            self.client.set_terminated(self.run_id, "FINISHED", _milliseconds(end["time"]))
            self.status = "FINISHED"

    def _commit(self, metrics: Sequence[Metric], end: Mapping[str, Any] | None) -> None:
        for at in range(0, len(metrics), METRICS_A_CALL):
            self.client.log_batch(self.run_id, metrics=metrics[at : at + METRICS_A_CALL])
        if end is not None:
            self._end(end)
        self.client.set_tag(self.run_id, COMMITTED, str(self.seen))
        self.committed = self.seen

    def _take(self, outcome: Outcome, when: int) -> list[Metric]:
        """Adds a trial to the running state; its points on the parent's curves (steps count trials)."""
        self.tokens += outcome.tokens
        step, self.trials = self.trials, self.trials + 1
        rank = (-outcome.tokens, outcome.loss)
        if outcome.usable and (self.best is None or rank < self.best):
            self.best = rank
        points = {"search/tokens": float(self.tokens)}
        if outcome.usable:
            points["search/trial_loss"] = outcome.loss
        if self.best is not None:
            points["search/best_loss"] = self.best[1]
        if self.space is not None:
            points["search/average"] = self.space.average(outcome.trial.levels)
        return [Metric(key, value, when, step) for key, value in points.items()]

    def _checkpoint(self, line: Mapping[str, Any]) -> list[Metric]:
        """Held-out figures; steps are tokens spent (trials where the problem reads none)."""
        point = decode_checkpoint(line)
        step, when = point.tokens or point.evaluations, _milliseconds(line["time"])
        figures = {f"held_out/{safe_key(k)}": v for k, v in point.held_out.items()}
        if self.space is not None:
            figures["held_out/average"] = self.space.average(point.levels)
        return [Metric(k, v, when, step) for k, v in figures.items()]

    def _end(self, line: Mapping[str, Any]) -> None:
        figures = {k: float(line[k]) for k in ("seconds", "searcher_seconds")} | {"trials": float(self.trials)}
        if line["best"] is not None and math.isfinite(float(line["best_loss"])):
            figures["loss"] = float(line["best_loss"])
        when = _milliseconds(line["time"])
        params: list[Param] = []
        if line["best"] is not None:
            params.append(Param("best_levels", shown(line["best"], LONGEST_PARAM, "the journal")))
            params += self._unit_params(decode_levels(line["best"]))
        metrics = [Metric(f"final/{k}", v, when, 0) for k, v in figures.items()]
        tags = [RunTag("stop_reason", shown(line["stop_reason"], LONGEST_TAG, "the journal"))]
        self.client.log_batch(self.run_id, metrics=metrics, params=params[:1], tags=tags)
        for at in range(1, len(params), PARAMS_A_CALL):
            self.client.log_batch(self.run_id, params=params[at : at + PARAMS_A_CALL])

    def leave(self, *, running: bool) -> None:
        """Marks a search that neither ended nor runs as interrupted (status KILLED); resuming it undoes that."""
        if self.status == "RUNNING" and not running:
            with translated(f"search {self.search}"):
                self.client.set_terminated(self.run_id, "KILLED")
                self.status = "KILLED"

    # ------------------------------------------------------------------ children

    def _children(self) -> dict[str, tuple[str, str]]:
        """Trial number -> (run id, status) of the children of the chunk that is open."""
        where = f"tags.`mlflow.parentRunId` = '{self.run_id}' and tags.chunk = '{self.committed}'"
        found: dict[str, tuple[str, str]] = {}
        token: str | None = None
        while True:
            page = self.client.search_runs([self.experiment], where, max_results=1000, page_token=token)
            found.update({r.data.tags["trial"]: (r.info.run_id, r.info.status) for r in page})
            token = page.token
            if not token:
                return found

    def _child(self, outcome: Outcome, when: int, known: tuple[str, str] | None) -> None:
        trial = outcome.trial
        status = "FAILED" if outcome.status == "failed" else "FINISHED"
        if known is not None and known[1] == status:
            return
        run_id = known[0] if known else self._create_child(outcome, when)
        metrics = {"tokens": float(outcome.tokens)}
        if outcome.status != "failed" and math.isfinite(outcome.loss):
            metrics["loss" if outcome.status == "complete" else "loss_at_least"] = outcome.loss
        if self.space is not None:
            metrics["average"] = self.space.average(trial.levels)
        params = [
            Param("levels", shown(encode_levels(trial.levels), LONGEST_PARAM, "the journal")),
            Param("generation", str(trial.generation)),
            Param("stage", str(trial.stage)),
            Param("minibatch", str(outcome.minibatch)),
        ]
        if len(self.unit_keys) <= UNITS_SHOWN:
            params += self._unit_params(trial.levels)
        self.client.log_batch(run_id, [Metric(k, v, when, 0) for k, v in metrics.items()], params)
        self.client.set_terminated(run_id, status, when)

    def _create_child(self, outcome: Outcome, when: int) -> str:
        trial = outcome.trial
        tags = {
            "mlflow.parentRunId": self.run_id,
            "kind": "trial",
            "search": self.search,
            "trial": str(trial.number),
            "chunk": str(self.committed),
            "status": outcome.status,
        }
        if trial.parent is not None:
            tags["parent_trial"] = str(trial.parent)
        tags |= {k: v for k, v in (("note", trial.note), ("reason", outcome.reason)) if v}
        run = self.client.create_run(
            self.experiment,
            start_time=when - int(1000 * outcome.seconds),
            tags={k: shown(v, LONGEST_TAG, "the journal") for k, v in tags.items()},
            run_name=f"{shown(self.name, LONGEST_NAME - 12, 'header.json')} t{trial.number:04d}",
        )
        return str(run.info.run_id)

    def _unit_params(self, levels: Sequence[int]) -> list[Param]:
        if self.space is None:
            return []
        labels = self.space.labels(levels).values()
        return [Param(key, label) for key, label in zip(self.unit_keys, labels, strict=True)]


def _milliseconds(seconds: Any) -> int:
    return 0 if seconds is None else int(float(seconds) * 1000)


def experiment_name(folder: Path) -> str:
    """The experiment of a comparison's folder or of a journal in it: the folder's name."""
    folder = folder.resolve()
    if folder.is_file():
        folder = folder.parent
    return folder.parent.name if folder.name == "journals" else folder.name
