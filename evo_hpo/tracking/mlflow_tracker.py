"""Searches as MLflow runs: a parent run a search, a child run a trial.

Every write can be repeated. Lines of a journal are written in chunks; a chunk is committed when the parent's tag
``evo_hpo.committed`` counts its lines. After a crash the open chunk is written again: its children are found by their
tag ``chunk``, finished ones are skipped, running ones are completed, and equal metric points are one point.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException

from evo_hpo.errors import TrackingError
from evo_hpo.tracking.location import database_path, experiment_location
from evo_hpo.tracking.mlflow_store import connect, translated
from evo_hpo.tracking.rows import RowWriter
from evo_hpo.tracking.runs import LONGEST_NAME, ChildRun, Point, SearchRuns, milliseconds
from evo_hpo.tracking.views import trials_link

COMMITTED = "evo_hpo.committed"
KEY = "evo_hpo.key"
OURS = "evo_hpo.comparison"
EXPERIMENT_TAGS = {OURS: "true", "mlflow.experimentKind": "custom_model_development"}
METRICS_A_CALL = 1000
PARAMS_A_CALL = 100


def experiment_name(folder: Path) -> str:
    """The experiment of a comparison's folder or of a journal in it: the folder's name."""
    folder = folder.resolve()
    if folder.is_file():
        folder = folder.parent
    return folder.parent.name if folder.name == "journals" else folder.name


def write(
    client: MlflowClient,
    run: str,
    points: Sequence[Point] = (),
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Points, parameters and tags of a run, in calls of allowed size."""
    metrics = [Metric(p.key, p.value, p.when, p.step) for p in points]
    for at in range(0, len(metrics), METRICS_A_CALL):
        client.log_batch(run, metrics=metrics[at : at + METRICS_A_CALL])
    entries = [Param(k, v) for k, v in (params or {}).items()]
    for at in range(0, len(entries), PARAMS_A_CALL):
        client.log_batch(run, params=entries[at : at + PARAMS_A_CALL])
    if tags:
        client.log_batch(run, tags=[RunTag(k, v) for k, v in tags.items()])


class MlflowTracker:
    """The searches of one comparison in one experiment.

    Args:
        uri: tracking URI.
        experiment: name of the experiment; created if it does not exist.
        direct: writes trials straight into the tables of an SQLite store where its schema is known (see
            :mod:`evo_hpo.tracking.rows`); False: always through MLflow's API.

    Raises:
        TrackingError: the store cannot be used, or the name cannot be an experiment's.
    """

    def __init__(self, uri: str, experiment: str, *, direct: bool = True) -> None:
        if not experiment.strip() or len(experiment) > LONGEST_NAME:
            raise TrackingError(
                f"experiment name {experiment[:60]!r} has {len(experiment)} characters, allowed 1 to {LONGEST_NAME}:"
                " rename the comparison"
            )
        self.uri = uri
        self.client = connect(uri)
        with translated(f"experiment {experiment!r}"):
            self.experiment, location = self._experiment(experiment)
        path = database_path(uri)
        self.rows = None
        if direct and path is not None and RowWriter.supports(path):
            self.rows = RowWriter(path, self.experiment, location)

    def _experiment(self, name: str) -> tuple[str, str]:
        known = self.client.get_experiment_by_name(name)
        if known is None:
            try:
                created = self.client.create_experiment(name, experiment_location(self.uri, name), EXPERIMENT_TAGS)
                known = self.client.get_experiment(created)
            except MlflowException:  # another process was faster
                known = self.client.get_experiment_by_name(name)
                if known is None:
                    raise
        if known.lifecycle_stage != "active":
            raise TrackingError(
                f"experiment {name!r} was deleted in MLflow: restore it with `mlflow experiments restore"
                f" --experiment-id {known.experiment_id}`, or rename the comparison"
            )
        if OURS not in known.tags:  # such as MLflow's own "Default": from now on it is listed among comparisons too
            self.client.set_experiment_tag(known.experiment_id, OURS, "true")
        return str(known.experiment_id), str(known.artifact_location)

    def search(self, header: Mapping[str, Any]) -> MlflowSearch:
        """The parent run of a search: found by the hash of its header, else created."""
        return MlflowSearch(self.client, self.experiment, header, self.rows)

    def own_run(
        self, name: str, tags: Mapping[str, str], params: Mapping[str, str], may_differ: Collection[str] = ()
    ) -> str:
        """The newest run of these tags that says nothing else of these parameters, else a new one; running.

        Parameters of a run never change: one that has others is of something else that had the same name.

        Args:
            may_differ: parameters that are not looked at.
        """
        with translated(f"run {name!r}"):
            where = " and ".join(f"tags.`{k}` = '{v}'" for k, v in tags.items())
            for run in self.client.search_runs([self.experiment], where, ViewType.ACTIVE_ONLY, max_results=1000):
                if all(params.get(k) == v for k, v in run.data.params.items() if k not in may_differ):
                    return str(run.info.run_id)
            return str(self.client.create_run(self.experiment, tags=dict(tags), run_name=name).info.run_id)

    def attach(
        self,
        header: Mapping[str, Any],
        files: Sequence[Path],
        metrics: Mapping[str, float] | None = None,
        folder: str = "",
    ) -> None:
        """Puts files and figures beside a search, where the search is in the store.

        A file of the same name is replaced; figures that are there already are not written again.

        Args:
            folder: among the search's artifacts; default: as the one that each file lies in.
        """
        if not files and not metrics:
            return
        with translated(f"search {header.get('search')}"):
            where = f"tags.`{KEY}` = '{SearchRuns(header).key}'"
            for run in self.client.search_runs([self.experiment], where, ViewType.ACTIVE_ONLY, max_results=1):
                for file in files:
                    self.client.log_artifact(run.info.run_id, str(file), folder or file.parent.name)
                now, known = milliseconds(time.time()), run.data.metrics
                new = {k: v for k, v in (metrics or {}).items() if known.get(k) != v}
                write(self.client, run.info.run_id, [Point(k, v, now, 0) for k, v in new.items()])

    def log_own(
        self,
        run: str,
        *,
        params: Mapping[str, str],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        files: Sequence[Path],
        folders: Sequence[Path],
    ) -> None:
        """Writes the comparison's own run and finishes it; files of an earlier upload are replaced."""
        with translated("the comparison's run"):
            now = milliseconds(time.time())
            known = self.client.get_run(run).data.params
            points = [Point(k, v, now, 0) for k, v in metrics.items()]
            write(self.client, run, points, {k: v for k, v in params.items() if k not in known}, tags)
            for file in files:
                self.client.log_artifact(run, str(file))
            for folder in folders:
                self.client.log_artifacts(run, str(folder), folder.name)
            self.client.set_terminated(run, "FINISHED")

    def tag_experiment(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the experiment."""
        with translated("the experiment's tags"):
            for key, value in tags.items():
                self.client.set_experiment_tag(self.experiment, key, value)


class MlflowSearch:
    """One search as a parent run with a child run a trial.

    Attributes:
        run_id: of the parent.
        committed: lines of the journal (the header is one) that are in the store for good.
    """

    def __init__(
        self, client: MlflowClient, experiment: str, header: Mapping[str, Any], rows: RowWriter | None
    ) -> None:
        self.client = client
        self.experiment = experiment
        self.runs = SearchRuns(header)
        self.rows = rows
        self.seen = 0
        self.unsure = False
        with translated(f"search {self.runs.search}"):
            self.run_id, self.committed, self.status = self._open()
            self.known = self._children()

    def _open(self) -> tuple[str, int, str]:
        where = f"tags.`{KEY}` = '{self.runs.key}'"
        found = self.client.search_runs([self.experiment], where, ViewType.ACTIVE_ONLY, max_results=1)
        if found:
            run = found[0]
            return run.info.run_id, int(run.data.tags.get(COMMITTED, 0)), str(run.info.status)
        run = self.client.create_run(
            self.experiment,
            start_time=self.runs.start,
            tags={
                KEY: self.runs.key,
                "mlflow.note.content": f"[its trials, best first]({trials_link(self.experiment, self.runs.search)})",
                **self.runs.tags(),
            },
            run_name=self.runs.name,
        )
        return run.info.run_id, 0, "RUNNING"

    # ------------------------------------------------------------------ lines

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """The next lines of the journal, as one chunk; can be given again when it raises.

        Raises:
            TrackingError: the store cannot be reached.
        """
        seen, state = self.seen, self.runs.state
        try:
            with translated(f"search {self.runs.search}"):
                if self.unsure:
                    self.known, self.unsure = self._children(), False
                self._log(lines)
        except BaseException:
            self.seen, self.runs.state, self.unsure = seen, state, True
            raise

    def _log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        children: list[ChildRun] = []
        points: list[Point] = []
        header = end = None
        for line in lines:
            new, self.seen = self.seen >= self.committed, self.seen + 1
            kind = line["kind"]
            if kind == "outcome":
                outcome, curve = self.runs.take(line)
                if new:
                    points += curve
                    children.append(self.runs.child(outcome, milliseconds(line["time"])))
            elif kind == "probe":
                self.runs.take_probe(line)
            elif kind == "checkpoint" and new:
                points += self.runs.checkpoint(line)
            elif kind == "header" and new:
                header = line
            elif kind == "end":
                end = line
        if self.seen > self.committed:
            self._commit(header, children, points, end)
        if end is not None and self.status != "FINISHED":
            self.client.set_terminated(self.run_id, "FINISHED", milliseconds(end["time"]))
            self.status = "FINISHED"

    def _commit(
        self,
        header: Mapping[str, Any] | None,
        children: Sequence[ChildRun],
        points: list[Point],
        end: Mapping[str, Any] | None,
    ) -> None:
        if self.status != "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
            self.status = "RUNNING"
        if header is not None:
            self.client.log_dict(self.run_id, dict(header), "header.json")
            write(self.client, self.run_id, params=self.runs.params())
        if end is not None:
            last, params, tags = self.runs.end(end)
            points += last
            write(self.client, self.run_id, params=params, tags=tags)
        if self.rows is not None and not self.known:
            self.rows.write(self.run_id, children, points, {COMMITTED: str(self.seen)})
        else:
            for child in children:
                self._child(child)
            write(self.client, self.run_id, points)
            self.client.set_tag(self.run_id, COMMITTED, str(self.seen))
        self.committed, self.known = self.seen, {}

    def leave(self, *, running: bool) -> None:
        """Marks a search that neither ended nor runs as interrupted (status KILLED); resuming it undoes that."""
        if self.status == "RUNNING" and not running:
            with translated(f"search {self.runs.search}"):
                self.client.set_terminated(self.run_id, "KILLED")
                self.status = "KILLED"

    # ------------------------------------------------------------------ children, through the API

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

    def _child(self, child: ChildRun) -> None:
        run_id, status = self.known.get(str(child.trial), ("", ""))
        if status == child.status:
            return
        if not run_id:
            tags = {**child.tags, "mlflow.parentRunId": self.run_id, "chunk": str(self.committed)}
            run = self.client.create_run(self.experiment, start_time=child.start, tags=tags, run_name=child.name)
            run_id = run.info.run_id
            self.known[str(child.trial)] = run_id, "RUNNING"
        metrics = [Metric(k, v, child.end, 0) for k, v in child.metrics.items()]
        self.client.log_batch(run_id, metrics, [Param(k, v) for k, v in child.params.items()])
        self.client.set_terminated(run_id, child.status, child.end)
        self.known[str(child.trial)] = run_id, child.status
