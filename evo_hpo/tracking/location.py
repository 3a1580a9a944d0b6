"""Where runs are kept: by default SQLite in ``mlruns/mlflow.db`` with artifacts beside it. Knows no MLflow."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shlex
import sqlite3
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from evo_hpo.errors import TrackingError

SIGN_OF_LIFE = 5.0
"""Seconds within which a tracking server must answer to be tried at all, unless MLflow's own setting is lower."""

PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""Of MLflow's client, unless the environment says otherwise: with its own, a silent server costs minutes a call."""


def quiet_environment() -> dict[str, str]:
    """Environment that MLflow needs before it is imported: no telemetry, no silent cuts, no chatter."""
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_TRUNCATE_LONG_VALUES": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "GIT_PYTHON_REFRESH": "quiet",
        **{name: os.environ.get(name, value) for name, value in PATIENCE.items()},
    }


def refuse_no_store(uri: str) -> None:
    """Looks whether there can be a store: a file of SQLite or none yet, or a server that answers, whatever it says.

    Raises:
        TrackingError: the file is none of SQLite's; or the server gives no sign of life within a few seconds.
    """
    if not uri.startswith("http"):
        if (path := database_path(uri)) and path.is_file():
            with contextlib.closing(sqlite3.connect(path)) as database:  # its file must not be opened in another way
                try:
                    database.execute("PRAGMA schema_version")
                except sqlite3.OperationalError:  # locked, for example, which passes
                    pass
                except sqlite3.DatabaseError as error:
                    raise TrackingError(
                        f"{path} is no SQLite database ({error}): move it away, or choose another --tracking-uri"
                    ) from None
        return
    patience = min(SIGN_OF_LIFE, float(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", SIGN_OF_LIFE)))
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=patience):
            pass
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # which certificates are good is the client's business
            raise TrackingError(f"the tracking server {uri} does not answer ({reason}): is it running?") from None


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


def track_command(folder: Path | str, tracking_uri: str | None = None) -> str:
    """What a user types to copy a comparison into the store that it went to; ``tracking_uri`` where one was given."""
    return shlex.join(["evo-hpo", "track", str(folder), *(["--tracking-uri", tracking_uri] if tracking_uri else [])])


def ui_command(folder: Path | str, tracking_uri: str | None = None) -> str:
    """What a user types here to browse the store that a comparison went to."""
    uri = tracking_uri or default_uri(folder)
    return shlex.join(["evo-hpo", "ui", *(["--tracking-uri", uri] if uri != default_uri() else [])])


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
