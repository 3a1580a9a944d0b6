"""Trials straight into MLflow's SQLite tables: one transaction a chunk, some thirty times less work than its API.

The tables are MLflow's own and not an interface, so this is used only for the schema versions named here; any other
database is written through the API, with the same result.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from evo_hpo.tracking.runs import ChildRun, Point

SCHEMAS = frozenset({"dc11669786a5"})
"""Schema versions (MLflow 3.17) whose tables are written."""


class RowWriter:
    """Writes chunks of trials into an SQLite store.

    Args:
        path: the database.
        experiment: id of the experiment.
        location: the experiment's artifact location.
    """

    def __init__(self, path: Path, experiment: str, location: str) -> None:
        self.path = path
        self.experiment = int(experiment)
        self.location = location.rstrip("/")
        self.unanalyzed = 0
        self.analyze_at = 200

    @staticmethod
    def supports(path: Path) -> bool:
        """True when the database has a schema that this module knows."""
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=20.0)) as database:
                found = database.execute("SELECT version_num FROM alembic_version").fetchall()
        except sqlite3.Error:
            return False
        return len(found) == 1 and found[0][0] in SCHEMAS

    def write(
        self, parent: str, children: Sequence[ChildRun], points: Sequence[Point], tags: Mapping[str, str]
    ) -> None:
        """Adds trials, points of the parent's curves, and the parent's tags: all or nothing, and only once.

        Raises:
            sqlite3.Error: the database is locked for long, full or damaged; nothing was written.
        """
        ids = [self._id(parent, child.trial) for child in children]
        with contextlib.closing(sqlite3.connect(self.path, timeout=60.0, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous=NORMAL")
            database.execute("BEGIN IMMEDIATE")
            try:
                self._insert(database, parent, list(zip(ids, children, strict=True)), points, tags)
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise
            self._analyze(database, len(children))

    def _analyze(self, database: sqlite3.Connection, added: int) -> None:
        """Refreshes the statistics of the query planner each time the trials doubled.

        Without them, sorting 20 000 trials by a metric takes SQLite a minute instead of 0.3 s.
        """
        self.unanalyzed += added
        if self.unanalyzed < self.analyze_at:
            return
        self.analyze_at *= 2
        with contextlib.suppress(sqlite3.OperationalError):  # another writer is at it
            database.execute("PRAGMA analysis_limit=1000")
            database.execute("ANALYZE")

    @staticmethod
    def _id(parent: str, trial: int) -> str:
        """The same trial always has the same run id."""
        return uuid.uuid5(uuid.UUID(hex=parent), str(trial)).hex

    def _insert(
        self,
        database: sqlite3.Connection,
        parent: str,
        runs: Sequence[tuple[str, ChildRun]],
        points: Sequence[Point],
        tags: Mapping[str, str],
    ) -> None:
        add = database.executemany
        add(
            "INSERT OR IGNORE INTO runs (run_uuid, name, source_type, source_name, entry_point_name, user_id, status,"
            " start_time, end_time, deleted_time, source_version, lifecycle_stage, artifact_uri, experiment_id)"
            " VALUES (?, ?, 'UNKNOWN', '', '', 'unknown', ?, ?, ?, NULL, '', 'active', ?, ?)",
            (
                (run, c.name, c.status, c.start, c.end, f"{self.location}/{run}/artifacts", self.experiment)
                for run, c in runs
            ),
        )
        own = {"mlflow.parentRunId": parent}
        add(
            "INSERT OR REPLACE INTO tags (key, value, run_uuid) VALUES (?, ?, ?)",
            (
                (key, value, run)
                for run, c in runs
                for key, value in {**c.tags, **own, "mlflow.runName": c.name}.items()
            ),
        )
        add(
            "INSERT OR REPLACE INTO tags (key, value, run_uuid) VALUES (?, ?, ?)",
            ((k, v, parent) for k, v in tags.items()),
        )
        add(
            "INSERT OR IGNORE INTO params (key, value, run_uuid) VALUES (?, ?, ?)",
            ((key, value, run) for run, c in runs for key, value in c.params.items()),
        )
        own_points = ((run, Point(k, v, c.end, 0)) for run, c in runs for k, v in c.metrics.items())
        self._metrics(database, own_points)
        self._metrics(database, ((parent, point) for point in points))

    @staticmethod
    def _metrics(database: sqlite3.Connection, points: Iterable[tuple[str, Point]]) -> None:
        rows = [(p.key, *_storable(p.value), p.when, p.step, run) for run, p in points]
        database.executemany(
            "INSERT OR IGNORE INTO metrics (key, value, is_nan, timestamp, step, run_uuid) VALUES (?, ?, ?, ?, ?, ?)",
            rows,
        )
        latest = {(row[0], row[5]): row for row in sorted(rows, key=lambda r: (r[4], r[3]))}
        database.executemany(
            "INSERT INTO latest_metrics (key, value, is_nan, timestamp, step, run_uuid) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (key, run_uuid) DO UPDATE SET value = excluded.value, is_nan = excluded.is_nan,"
            " timestamp = excluded.timestamp, step = excluded.step"
            " WHERE (excluded.step, excluded.timestamp) >= (latest_metrics.step, latest_metrics.timestamp)",
            latest.values(),
        )


def _storable(value: float) -> tuple[float, int]:
    """A value as MLflow keeps it: NaN in a column of its own, infinity as the largest float."""
    if math.isnan(value):
        return 0.0, 1
    return max(-sys.float_info.max, min(sys.float_info.max, value)), 0
