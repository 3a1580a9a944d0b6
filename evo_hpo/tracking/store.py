"""Where runs are kept: by default SQLite in ``mlruns/mlflow.db`` with artifacts beside it, created once and whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from evo_hpo.errors import TrackingError

__all__ = ["artifact_root", "database_path", "default_uri", "file_lock", "prepare_store", "quiet_environment"]


def quiet_environment() -> dict[str, str]:
    """Environment that MLflow needs before it is imported: no telemetry, no silent cuts, no chatter."""
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_TRUNCATE_LONG_VALUES": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "GIT_PYTHON_REFRESH": "quiet",
    }


def default_uri(folder: Path | str | None = None) -> str:
    """The tracking URI to use where none is given.

    ``MLFLOW_TRACKING_URI`` if set; else the database of the ``mlruns`` folder that ``folder`` lies in; else of
    ``mlruns`` in the working directory.
    """
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return os.environ["MLFLOW_TRACKING_URI"]
    path = Path(folder).resolve() if folder is not None else Path.cwd()
    root = next((p for p in (path, *path.parents) if p.name == "mlruns"), Path.cwd() / "mlruns")
    return f"sqlite:///{root.resolve() / 'mlflow.db'}"


def database_path(uri: str) -> Path | None:
    """The file of an SQLite URI; None for any other.

    Raises:
        TrackingError: a folder or an unknown scheme is named.
    """
    if uri.startswith("sqlite:///"):
        return Path(uri.removeprefix("sqlite:///")).resolve()
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if scheme.partition("+")[0] in ("http", "https", "postgresql", "mysql", "mssql"):
        return None
    raise TrackingError(
        f"tracking URI {uri!r} is not usable: give sqlite:////absolute/path/mlflow.db, postgresql://... or http://host:port"
    )


def artifact_root(uri: str) -> str | None:
    """Where artifacts go, as a URI: beside an SQLite file, else under ``mlruns``; None: a server decides."""
    path = database_path(uri)
    if path is not None:
        return (path.parent / "artifacts").as_uri()
    return None if uri.startswith("http") else (Path.cwd() / "mlruns" / "artifacts").as_uri()


def experiment_location(uri: str, name: str) -> str | None:
    """Artifact location of a new experiment, safe for any name and short enough for MLflow's tables."""
    root = artifact_root(uri)
    if root is None:
        return None
    plain = re.sub(r"[^\w-]+", "_", name, flags=re.ASCII)[:40]
    return f"{root}/{plain}" if plain == name else f"{root}/{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds an exclusive lock on a file between processes; gives False when it is taken and ``wait`` is false."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def prepare_store(uri: str) -> None:
    """Creates a store that does not exist yet: one process at a time, and an SQLite file never half.

    An SQLite database is made under another name and renamed when it is complete, so a process killed meanwhile leaves
    nothing behind that a later one would trip over.

    Raises:
        TrackingError: the folder cannot be written.
    """
    path = database_path(uri)
    from evo_hpo.tracking.mlflow_tracker import create_schema

    if path is None:
        artifacts = artifact_root(uri)
        if artifacts is not None:  # on this machine at least, one process at a time
            name = hashlib.sha256(uri.encode()).hexdigest()[:8]
            with file_lock(Path(tempfile.gettempdir()) / f"evo-hpo-store-{os.getuid()}-{name}.lock"):
                create_schema(uri, artifacts)
        return
    if path.exists():
        return
    try:
        with file_lock(path.with_name(path.name + ".lock")):
            if path.exists():
                return
            growing = path.with_name(path.name + ".creating")
            for suffix in ("", "-wal", "-shm", "-journal"):
                growing.with_name(growing.name + suffix).unlink(missing_ok=True)
            create_schema(f"sqlite:///{growing}", (path.parent / "artifacts").as_uri())
            with contextlib.closing(sqlite3.connect(growing)) as database:
                database.execute("PRAGMA journal_mode=WAL")
            for suffix in ("-wal", "-shm"):
                growing.with_name(growing.name + suffix).unlink(missing_ok=True)
            os.replace(growing, path)
    except OSError as error:
        raise TrackingError(
            f"{path}: cannot create the store ({error.strerror}): choose another --tracking-uri"
        ) from error
