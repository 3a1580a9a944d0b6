"""The store: created once and whole, no network, hostile names, several writers."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import shlex
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evo_hpo.errors import TrackingError
from evo_hpo.files import file_lock
from evo_hpo.tracking import BackgroundTracker, log_comparison, track
from evo_hpo.tracking.location import default_uri, experiment_location
from evo_hpo.tracking.mlflow_tracker import MlflowTracker
from evo_hpo.tracking.runs import safe_key, shown
from tests.tracking.conftest import Runs, Script

WATCHED = """
import json, sys
seen = []
def watch(name, arguments):
    if name in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request", "http.client.connect"):
        seen.append([name, repr(arguments[1:] if name == "socket.connect" else arguments)])
sys.addaudithook(watch)
import evo_hpo.tracking as tracking
tracking.track(sys.argv[1])
tracking.log_comparison(sys.argv[1])
import threading, time
time.sleep(0.5)
print(json.dumps([seen, [t.name for t in threading.enumerate()]]))
"""


def python(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def together(target: Callable[..., Any], *calls: tuple[Any, ...]) -> None:
    """Runs calls in forked processes at the same time; all must succeed."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=arguments) for arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0


def test_four_processes_create_one_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    together(MlflowTracker, *((uri, name) for name in ("a", "b", "a", "c")))
    tracker = MlflowTracker(uri, "a")
    assert sorted(e.name for e in tracker.client.search_experiments()) == ["Default", "a", "b", "c"]
    assert {p.name for p in (tmp_path / "new").iterdir()} <= {
        "artifacts",
        "mlflow.db",
        "mlflow.db-shm",
        "mlflow.db-wal",
        "mlflow.db.lock",
    }


def test_a_store_left_half_made_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db.creating").write_bytes(b"half a database")
    tracker = MlflowTracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "a")
    assert tracker.rows is not None


def test_nothing_leaves_the_process(folder: Path, tmp_path: Path) -> None:
    (folder / "comparison.json").write_text("{}")
    (tmp_path / "home").mkdir()
    process = python(WATCHED, str(folder), HOME=str(tmp_path / "home"))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    connections, threads = json.loads(output.splitlines()[-1])
    assert connections == []
    assert threads == ["MainThread"]
    assert list((tmp_path / "home").iterdir()) == []
    assert not (Path.cwd() / "mlflow.db").exists()


def test_the_background_writer_follows_and_finishes(root: Path, runs: Runs) -> None:
    folder = root / "comparisons" / "followed"
    said: list[str] = []
    with BackgroundTracker(folder, say=said.append):
        script = Script(folder / "journals" / "a-s0.jsonl").write([3.0, 2.0])
        deadline = time.monotonic() + 60
        while not runs("tags.kind = 'trial'") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert len(runs("tags.kind = 'trial'")) == 2
        script.write([1.0], end=True)
    assert len(runs("tags.kind = 'trial'")) == 3
    assert runs("tags.kind = 'search'")[0].info.status == "FINISHED"
    assert [line for line in said if "catch up" in line] == []


def test_a_store_that_cannot_be_written_only_leaves_a_message(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "file").write_text("not a folder")
    folder = folder.rename(folder.with_name("with blanks"))
    uri = f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}"
    with BackgroundTracker(folder, uri, grace=0.5, say=said.append):
        pass
    assert any("not in MLflow yet" in line for line in said)
    assert shlex.split(said[-1]) == ["evo-hpo", "track", str(folder), "--tracking-uri", uri]
    assert "cannot create the store" in (folder / "tracking.log").read_text()


def test_two_comparisons_into_one_store_at_once(root: Path, runs: Runs) -> None:
    folders = [root / "comparisons" / name for name in ("left", "right")]
    for folder in folders:
        for seed in range(2):
            Script(folder / "journals" / f"a-s{seed}.jsonl", seed=seed).write([float(i) for i in range(300)], end=True)
    together(track, *((folder,) for folder in folders))
    assert len(runs("tags.kind = 'trial'")) == 1200
    assert not runs("attributes.status = 'RUNNING'")


def test_the_query_planner_has_statistics(root: Path, uri: str) -> None:
    folder = root / "comparisons" / "many"
    Script(folder / "journals" / "a-s0.jsonl").write([float(i) for i in range(300)], end=True)
    track(folder)
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        tables = {name for (name,) in database.execute("SELECT tbl FROM sqlite_stat1")}
    assert {"runs", "tags", "params", "metrics", "latest_metrics"} <= tables


def test_two_writers_of_one_comparison_are_refused(folder: Path, uri: str) -> None:
    from evo_hpo.tracking.writer import _lock_path

    with file_lock(_lock_path(folder, uri)), pytest.raises(TrackingError, match="another process is tracking"):
        track(folder)


HOSTILE = [
    "..",
    "../../up",
    "a/b\\c",
    "quote ' \" `",
    "semi;colon -- drop",
    "ü☃ %20 ?#",
    "line\nbreak",
    "x" * 200,
    "$(id)",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_stored_as_they_are(name: str, root: Path, uri: str, runs: Runs) -> None:
    path = root / "j" / "a.jsonl"
    script = Script(path, label=name, settings={name: name, "long": "v" * 10_000})
    script.header["search"] = name
    script.write([1.0], end=True, note=name)
    tracker = MlflowTracker(uri, name)
    from evo_hpo.tracking.writer import Replayer

    replayer = Replayer(path, lambda: tracker)
    while replayer.read():
        replayer.step()
    assert tracker.client.get_experiment(tracker.experiment).name == name
    (parent,) = runs("tags.kind = 'search'")
    assert parent.info.run_name == name
    assert name in parent.data.params.values()
    long = parent.data.params["settings/long"]
    assert (len(long), long[-44:]) == (6000, "... (10000 characters, whole in header.json)")
    (child,) = runs("tags.kind = 'trial'")
    assert child.data.tags["note"] == name
    stored = list((root / "artifacts").rglob("header.json"))
    assert len(stored) == 1
    assert stored[0].resolve().is_relative_to(root / "artifacts")
    assert json.loads(stored[0].read_text())["settings"] == {name: name, "long": "v" * 10_000}


def test_names_that_cannot_be_stored_are_refused(uri: str) -> None:
    for name in ("", "  ", "x" * 251):
        with pytest.raises(TrackingError, match="allowed 1 to 250"):
            MlflowTracker(uri, name)


def test_losses_that_are_no_numbers_are_marked(root: Path, uri: str, runs: Runs) -> None:
    Script(root / "comparisons" / "odd" / "journals" / "a-s0.jsonl").write(
        [math.inf, -math.inf, math.nan, 1.0], end=True
    )
    track(root / "comparisons" / "odd")
    children = runs("tags.kind = 'trial'", "attributes.run_name ASC")
    assert [c.info.status for c in children] == ["FAILED", "FAILED", "FAILED", "FINISHED"]
    assert [c.data.metrics.get("loss") for c in children] == [None, None, None, 1.0]


@pytest.mark.parametrize("name", ["a.b.c", "unit/model.layers.0", "with space", "a-b_c"])
def test_plain_keys_stay(name: str) -> None:
    assert safe_key(name) == name


def test_changed_keys_stay_different() -> None:
    keys = [safe_key(n) for n in ("a@b", "a=b", "a|b", "../a", "a//b", "/a", "x" * 300, "x" * 301, "é", "")]
    assert len(set(keys)) == len(keys)
    assert all(safe_key(k) == k for k in keys)


def test_nothing_is_cut_without_saying_so() -> None:
    assert shown("short", 100, "x") == "short"
    assert shown("long" * 100, 60, "the journal").endswith("(400 characters, whole in the journal)")
    assert len(shown("long" * 100, 60, "the journal")) == 60


def test_artifact_locations_stay_inside(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    places = {experiment_location(uri, name) for name in (*HOSTILE, "plain")}
    assert len(places) == len(HOSTILE) + 1
    assert all(str(p).startswith((tmp_path / "artifacts").as_uri()) and ".." not in str(p) for p in places)


def test_the_default_store_is_that_of_the_enclosing_mlruns(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert default_uri(root / "comparisons" / "x") == f"sqlite:///{root}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert default_uri() == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert default_uri(root) == "http://127.0.0.1:9"


def test_a_server_that_does_not_answer_is_named_within_seconds_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    Script(tmp_path / "journals" / "a.jsonl").write([1.0, 2.0], end=True)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        said: list[str] = []
        began = time.monotonic()
        with BackgroundTracker(tmp_path, uri, say=said.append):
            assert time.monotonic() - began < 10
            assert "does not answer" in said[0]
        assert time.monotonic() - began < 60
        with pytest.raises(TrackingError, match="does not answer"):
            track(tmp_path, uri)
    assert any("evo-hpo track" in line for line in said)


def test_a_file_that_is_no_database_is_named_at_once_and_not_waited_for(tmp_path: Path) -> None:
    Script(tmp_path / "journals" / "a.jsonl").write([1.0, 2.0], end=True)
    (tmp_path / "mlflow.db").write_bytes(bytes(range(256)))
    uri, said = f"sqlite:///{tmp_path / 'mlflow.db'}", list[str]()
    began = time.monotonic()
    with BackgroundTracker(tmp_path, uri, say=said.append):
        assert "is no SQLite database" in said[0]
    assert time.monotonic() - began < 60
    with pytest.raises(TrackingError, match=r"is no SQLite database \(.*\): move it away"):
        track(tmp_path, uri)
    assert any("evo-hpo track" in line for line in said)
    assert (tmp_path / "mlflow.db").read_bytes() == bytes(range(256))


def followed(folder: Path) -> None:
    """What `compare --resume` does when its searches are done."""
    with BackgroundTracker(folder):
        pass
    log_comparison(folder)


@pytest.mark.parametrize("again", [track, followed], ids=["track", "resume"])
def test_after_a_move_of_mlruns_everything_is_written_beside_the_database(
    root: Path, tmp_path: Path, again: Callable[[Path], object]
) -> None:
    """Each alone is the first that meets the moved folder: a search goes on, another is new, a file is uploaded."""
    new = tmp_path / "new" / "mlruns"
    going_on = Script(root / "comparisons" / "moved" / "journals" / "a.jsonl").write([1.0])
    track(root / "comparisons" / "moved")
    new.parent.mkdir()
    root.rename(new)
    folder = new / "comparisons" / "moved"
    going_on.path = folder / "journals" / "a.jsonl"
    going_on.write([0.5], end=True)
    Script(folder / "journals" / "b.jsonl", seed=1).write([1.0], end=True)
    again(folder)
    with contextlib.closing(sqlite3.connect(new / "mlflow.db")) as database:
        places = database.execute("SELECT artifact_uri FROM runs UNION SELECT artifact_location FROM experiments")
        found = [place for (place,) in places if "/artifacts/moved" in place]
        states = list(database.execute("SELECT DISTINCT status FROM runs"))
        assert states == [("FINISHED",)]
    assert found
    assert all(place.startswith((new / "artifacts").as_uri()) for place in found)
    assert not root.exists()
