"""Losses that were paid for, on disk: (context, assignment, minibatch) -> sums of each sequence."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evo_hpo.errors import InvalidSettingError
from evo_hpo.models.paths import made_folder
from evo_hpo.search.problem import Minibatch
from evo_hpo.space.compression_space import Assignment

_SCHEMA = """
CREATE TABLE IF NOT EXISTS scores (
    context TEXT NOT NULL, seed INTEGER NOT NULL, tokens INTEGER NOT NULL, levels BLOB NOT NULL, sums BLOB NOT NULL,
    PRIMARY KEY (context, seed, tokens, levels)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS settings (context TEXT PRIMARY KEY, json TEXT NOT NULL) WITHOUT ROWID;
"""


def check_cache(path: Path) -> None:
    """Looks whether losses can be kept in this file; makes none.

    Raises:
        InvalidSettingError: they cannot.
    """
    try:
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
        if there == path:
            _read(path)
    except (OSError, sqlite3.Error) as error:
        raise InvalidSettingError(f"cache={str(path)!r} cannot be used ({error}): name another file") from error
    if there != path and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InvalidSettingError(f"cache={str(path)!r} cannot be used ({there} takes no files): name another file")


def _read(path: Path) -> None:
    """Raises sqlite3.Error where it is no database."""
    for way in ("mode=ro&immutable=1", "mode=ro"):  # the first makes no file, but may meet one that is being written
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{way}", uri=True)) as connection:
            try:
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                return
            except sqlite3.Error:
                if way == "mode=ro":
                    raise


class ScoreCache:
    """A SQLite file that several searches, also in several processes, may share.

    Args:
        path: the file; None: memory only.
        context: everything a loss depends on besides assignment and minibatch (model, store, data, fitness), as a hash.
    """

    def __init__(self, path: Path | None, context: str) -> None:
        if path is not None:
            made_folder(path.parent)
        self.context = context
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(path or ":memory:", timeout=60, check_same_thread=False)
            if path is not None:
                self._connection.execute("PRAGMA journal_mode=WAL")
                self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise InvalidSettingError(f"cache={str(path)!r} cannot be used ({error}): name another file") from error

    def get(self, assignment: Assignment, minibatch: Minibatch) -> NDArray[np.float64] | None:
        """Sums of each sequence of the minibatch (nats), or None."""
        query = "SELECT sums FROM scores WHERE context=? AND seed=? AND tokens=? AND levels=?"
        key = (self.context, minibatch.seed, minibatch.tokens, _encode(assignment))
        with self._lock:
            row = self._connection.execute(query, key).fetchone()
        return None if row is None else np.frombuffer(row[0], dtype="<f8")

    def put(self, scores: dict[Assignment, NDArray[np.float64]], minibatch: Minibatch) -> None:
        """Keeps complete scores."""
        rows = [
            (self.context, minibatch.seed, minibatch.tokens, _encode(a), np.asarray(s, dtype="<f8").tobytes())
            for a, s in scores.items()
        ]
        with self._lock, self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?)", rows)

    def settings(self) -> dict[str, int]:
        """Measured settings of this context: kept, so that a resumed search computes bit for bit the same."""
        with self._lock:
            row = self._connection.execute("SELECT json FROM settings WHERE context=?", (self.context,)).fetchone()
        return {} if row is None else dict(json.loads(row[0]))

    def keep_settings(self, settings: dict[str, int]) -> None:
        """Keeps measured settings."""
        with self._lock, self._connection:
            row = (self.context, json.dumps(settings, sort_keys=True))
            self._connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", row)

    def export(self) -> Iterator[tuple[Assignment, Minibatch, NDArray[np.float64]]]:
        """Every score of this context: assignment, minibatch, sums of each sequence (nats)."""
        query = "SELECT levels, seed, tokens, sums FROM scores WHERE context=? ORDER BY seed, tokens, levels"
        with self._lock:
            rows = self._connection.execute(query, (self.context,)).fetchall()
        for levels, seed, tokens, sums in rows:
            assignment = tuple(int(x) for x in np.frombuffer(levels, dtype="<u2"))
            yield assignment, Minibatch(seed, tokens), np.frombuffer(sums, dtype="<f8")

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()


def _encode(assignment: Assignment) -> bytes:
    return np.asarray(assignment, dtype="<u2").tobytes()
