"""An MLflow store: created once and whole, connected to, its errors translated."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy import event

from evo_hpo.errors import MissingPackageError, RefusedError, TrackingError
from evo_hpo.files import file_lock, made_whole
from evo_hpo.tracking.location import artifact_root, database_path, refuse_no_store

OUR_LOCATIONS = """
    SELECT e.artifact_location, e.experiment_id FROM experiments e JOIN experiment_tags t USING (experiment_id)
    WHERE t.key = 'evo_hpo.comparison' AND e.artifact_location IS NOT NULL
"""

REFUSED = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")
"""Codes of MLflow that say: not this, and not later either."""

for noisy in ("mlflow", "alembic"):
    logging.getLogger(noisy).setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs the trace of what it raises


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


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turns what MLflow and the database raise into TrackingError, and what is refused for good into RefusedError."""
    try:
        yield
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
        lasting = getattr(error, "error_code", "") in REFUSED
        raise (RefusedError if lasting else TrackingError)(f"{doing}: {_reason(error)}") from error
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{doing}: needs the database driver {error.name!r}: install it, or name another in the URI"
            " (for example postgresql+psycopg2://)"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error's text that says what is wrong: SQLAlchemy may begin with where it happened."""
    lines = [line.strip() for line in str(error).splitlines() if not line.startswith("(raised as a result of")]
    return next(filter(None, lines), type(error).__name__)


def prepare_store(uri: str) -> None:
    """Creates a store that does not exist yet: one process at a time, and an SQLite file never half.

    An SQLite database is made under another name and renamed when it is complete, so a process killed meanwhile leaves
    nothing behind that a later one would trip over.

    Raises:
        TrackingError: the folder cannot be written.
    """
    path = database_path(uri)
    if path is None:
        artifacts = artifact_root(uri)
        if artifacts is not None:  # on this machine at least, one process at a time
            name = hashlib.sha256(uri.encode()).hexdigest()[:8]
            with file_lock(Path(tempfile.gettempdir()) / f"evo-hpo-store-{os.getuid()}-{name}.lock"):
                create_schema(uri, artifacts)
        return
    if path.exists():
        _follow_a_move(path)
        return
    try:
        with file_lock(path.with_name(path.name + ".lock")):
            if path.exists():
                return
            with made_whole(path) as growing:
                create_schema(f"sqlite:///{growing}", (path.parent / "artifacts").as_uri())
                with contextlib.closing(sqlite3.connect(growing)) as database:
                    database.execute("PRAGMA journal_mode=WAL")
                for suffix in ("-wal", "-shm"):
                    growing.with_name(growing.name + suffix).unlink(missing_ok=True)
    except OSError as error:
        raise TrackingError(
            f"{path}: cannot create the store ({error.strerror}): choose another --tracking-uri"
        ) from error


def _follow_a_move(path: Path) -> None:
    """Lets the comparisons of a database whose folder was moved or copied keep their artifacts beside it.

    MLflow records where artifacts lie as absolute places: what is tracked later would go where the folder was.
    """
    here = (path.parent / "artifacts").as_uri()
    with contextlib.closing(sqlite3.connect(path, timeout=60.0)) as database, database:
        known = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiment_tags'").fetchone()
        for location, number in database.execute(OUR_LOCATIONS).fetchall() if known else ():
            there, _, name = str(location).rpartition("/")
            if there == here or not there.endswith("/artifacts") or not there.startswith("file://"):
                continue
            if Path(url2pathname(urlparse(location).path)).exists() and not (path.parent / "artifacts" / name).exists():
                continue  # the database alone was moved
            database.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (f"{here}/{name}", number)
            )
            database.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?)"
                " WHERE experiment_id = ? AND artifact_uri LIKE ?",
                (here, len(there) + 1, number, f"{there}/%"),
            )


def connect(uri: str) -> MlflowClient:
    """A client of a store, which is created if it is an SQLite file that does not exist.

    Raises:
        TrackingError: it cannot be used.
    """
    refuse_no_store(uri)
    with translated(f"tracking store {uri}"):
        prepare_store(uri)
        artifacts = artifact_root(uri)
        if artifacts is not None:  # or else the client makes ./mlruns wherever it stands
            os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = artifacts
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


def comparisons(uri: str) -> list[tuple[str, str]]:
    """Id and name of every comparison in a store, newest first.

    Raises:
        TrackingError: the store cannot be used.
    """
    client = connect(uri)
    with translated(f"tracking store {uri}"):
        found = client.search_experiments(
            filter_string="tags.`evo_hpo.comparison` = 'true'", order_by=["last_update_time DESC"], max_results=1000
        )
    return [(str(e.experiment_id), str(e.name)) for e in found]
