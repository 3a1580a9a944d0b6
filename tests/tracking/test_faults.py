"""What is wrong with one journal, one search or one moment of the store stays with it, and is told."""

from __future__ import annotations

import json
import logging
import shlex
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from evo_hpo.errors import JournalError, RefusedError, TrackingError
from evo_hpo.tracking import BackgroundTracker, track, writer
from evo_hpo.tracking.location import track_command, ui_command
from evo_hpo.tracking.mlflow_store import comparisons, translated
from evo_hpo.tracking.mlflow_tracker import MlflowTracker
from evo_hpo.tracking.writer import Replayer, follow_until_closed
from tests.tracking.conftest import Runs, Script


def torn(lines: list[str]) -> None:
    lines[2] = lines[2][:20] + "\n"


def of_the_future(lines: list[str]) -> None:
    lines[0] = json.dumps({**json.loads(lines[0]), "format": 99}) + "\n"


def without_levels(lines: list[str]) -> None:
    lines[2] = json.dumps({k: v for k, v in json.loads(lines[2]).items() if k != "levels"}) + "\n"


def damaged(folder: Path, how: Callable[[list[str]], None]) -> Path:
    """Another journal in the folder, the first by name, changed."""
    path = Script(folder / "journals" / "bad-s0.jsonl", seed=7).write([1.0, 2.0, 3.0]).path
    lines = path.read_text().splitlines(keepends=True)
    how(lines)
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [(torn, "is damaged"), (of_the_future, "journal format 99"), (without_levels, "KeyError.'levels'")],
)
def test_a_journal_that_cannot_be_read_keeps_no_other_out(
    folder: Path, runs: Runs, how: Callable[[list[str]], None], message: str
) -> None:
    path = damaged(folder, how)
    (folder / "comparison.json").write_text("{}")
    with pytest.raises(JournalError, match=f"bad-s0.*{message}.*; the other journals are in MLflow"):
        track(folder)
    found = {r.data.tags["search"]: r.info.status for r in runs("tags.kind = 'search' and tags.search != 'bad-s0'")}
    assert found == {"good-s0": "FINISHED", "cut-s1": "KILLED"}
    assert len(runs("tags.kind = 'trial' and tags.search != 'bad-s0'")) == 6
    assert len(runs("tags.kind = 'comparison'")) == 1
    path.unlink()
    Script(path, seed=7).write([1.0, 2.0, 3.0], end=True)  # restored
    track(folder)
    assert len(runs("tags.kind = 'trial' and tags.search = 'bad-s0'")) == 3


def test_a_journal_that_is_mended_while_it_is_followed_is_read_on(folder: Path, uri: str, runs: Runs) -> None:
    path = folder / "journals" / "cut-s1.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"no JSON\n" + whole)
    replayer = Replayer(folder, lambda: MlflowTracker(uri, "small"))
    while replayer.read():
        replayer.step()
    assert ["damaged" in str(error) for error in replayer.errors] == [True]
    path.write_bytes(whole)
    while replayer.read():
        replayer.step()
    assert replayer.errors == []
    assert len(runs("tags.kind = 'trial'")) == 6


def test_nobody_waits_for_a_damaged_journal_and_it_is_told(folder: Path, runs: Runs) -> None:
    damaged(folder, torn)
    said: list[str] = []
    began = time.monotonic()
    with BackgroundTracker(folder, grace=100.0, say=said.append):
        pass
    assert time.monotonic() - began < 60
    assert len(runs("tags.kind = 'trial'")) == 6
    assert ["bad-s0" in line and "is damaged" in line for line in said if "whole" in line] == [True]
    assert said[-1] == f"  evo-hpo track {folder}"
    assert not [line for line in said if "yet" in line]  # all lines that can be read are there
    assert (folder / "tracking.log").read_text().count("is damaged") == 1


def test_a_search_that_the_store_refuses_keeps_no_other_out(folder: Path, uri: str, runs: Runs) -> None:
    replayer = Replayer(folder, lambda: MlflowTracker(uri, "small", direct=False))
    while replayer.read():
        replayer.step()
    script = Script(folder / "journals" / "cut-s1.jsonl", seed=1)
    late = Script(folder / "journals" / "late-s2.jsonl", seed=2).write([3.0], end=True)
    (gone,) = runs("tags.kind = 'search' and tags.search = 'cut-s1'")
    MlflowClient(tracking_uri=uri).delete_run(gone.info.run_id)
    script.count = 1
    script.write([4.0])
    while replayer.read():
        replayer.step()
    replayer.leave()
    assert [type(error) for error in replayer.errors] == [RefusedError]
    assert "cut-s1" in str(replayer.errors[0])
    assert runs(f"tags.kind = 'search' and tags.search = '{late.path.stem}'")[0].info.status == "FINISHED"


def test_lines_that_appear_while_a_store_gives_no_answer_are_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [folder / "journals" / name for name in ("cut-s1.jsonl", "good-s0.jsonl", "late-s2.jsonl")]

    def closed(wait: float) -> bool:
        Script(paths[-1], seed=2).write([1.0, 2.0], end=True)
        return True

    monkeypatch.setattr(writer, "_closed", closed)
    left, wrong = follow_until_closed(folder, "http://127.0.0.1:9", grace=60.0)
    assert left == sum(len(path.read_text().splitlines()) for path in paths)
    assert wrong == []


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "rows"
    key: Mapped[int] = mapped_column(primary_key=True)


def test_a_locked_database_is_called_locked_and_leaves_no_trace_on_the_screen(tmp_path: Path) -> None:
    path = tmp_path / "locked.db"
    engine = sqlalchemy.create_engine(f"sqlite:///{path}", connect_args={"timeout": 0})
    Base.metadata.create_all(engine)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with Session(engine) as session:
        session.add(Row(key=1))
        with pytest.raises(sqlalchemy.exc.OperationalError) as caught:
            session.query(Row).all()  # writes the row first
    assert str(caught.value).startswith("(raised as a result of")
    other.close()
    engine.dispose()
    for error in (caught.value, MlflowException(str(caught.value))):  # as of the file, and as of a server
        with (
            pytest.raises(TrackingError, match=r"^search x: \(sqlite3.OperationalError\) database is locked$"),
            translated("search x"),
        ):
            raise error
    assert not logging.getLogger("mlflow.store.db.utils").isEnabledFor(logging.ERROR)


def test_commands_lead_to_the_store_that_was_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    folder, uri = root / "comparisons" / "a b", "sqlite:////x y/m.db"
    assert shlex.split(track_command(folder)) == ["evo-hpo", "track", str(folder)]
    assert shlex.split(track_command(folder, uri)) == ["evo-hpo", "track", str(folder), "--tracking-uri", uri]
    assert ui_command(folder) == "evo-hpo ui"
    assert shlex.split(ui_command(folder, uri)) == ["evo-hpo", "ui", "--tracking-uri", uri]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where a bare command would open another store
    assert shlex.split(ui_command(folder)) == ["evo-hpo", "ui", "--tracking-uri", f"sqlite:///{root}/mlflow.db"]


def test_a_comparison_called_as_an_experiment_that_is_there_is_listed(root: Path, uri: str) -> None:
    Script(root / "comparisons" / "Default" / "journals" / "a-s0.jsonl").write([1.0], end=True)
    track(root / "comparisons" / "Default")
    assert [name for _, name in comparisons(uri)] == ["Default"]


def test_what_a_tracker_stumbles_over_is_no_fault_of_the_journal(folder: Path) -> None:
    """It is tried again, as whatever a store answers."""

    class Stumbling:
        def search(self, header: Any) -> None:
            raise KeyError("node_id")

    replayer = Replayer(folder, Stumbling)  # type: ignore[arg-type]
    assert replayer.read()
    for _ in range(2):
        with pytest.raises(KeyError, match="node_id"):
            replayer.step()
    assert replayer.errors == []
