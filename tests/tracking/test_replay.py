"""Journals in MLflow: complete, once, whatever was interrupted."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from evo_hpo.errors import JournalError, TrackingError
from evo_hpo.tracking import track
from evo_hpo.tracking.mlflow_tracker import MlflowSearch, MlflowTracker
from evo_hpo.tracking.rows import RowWriter
from evo_hpo.tracking.writer import JournalReplay, Replayer
from tests.tracking.conftest import Runs, Script


def contents(runs: Sequence[Any]) -> dict[str, Any]:
    """What a run says, without ids and without what only the writer needs."""
    return {
        r.info.run_name: (
            r.info.status,
            r.info.start_time,
            r.info.end_time,
            dict(r.data.params),
            dict(r.data.metrics),
            {k: v for k, v in r.data.tags.items() if k not in ("mlflow.parentRunId", "chunk")},
        )
        for r in runs
    }


def test_a_search_becomes_a_parent_with_children(folder: Path, runs: Runs) -> None:
    assert track(folder) == 10  # two headers, six trials, a checkpoint, an end
    (good,) = runs("tags.kind = 'search' and tags.search = 'good-s0'")
    assert (good.info.run_name, good.info.status) == ("good s0", "FINISHED")
    assert good.data.params["searcher"] == "script"
    assert good.data.params["budget/evaluations"] == "99"
    assert good.data.params["best_levels"] == "11111"
    assert good.data.metrics["search/best_loss"] == 0.5
    assert good.data.metrics["search/tokens"] == 500
    assert good.data.metrics["held_out/perplexity"] == 12.5
    children = runs(f"tags.`mlflow.parentRunId` = '{good.info.run_id}'", "attributes.run_name ASC")
    assert [c.info.run_name for c in children] == [f"good s0 t{n:04d}" for n in range(5)]
    assert [c.info.status for c in children] == ["FINISHED", "FINISHED", "FAILED", "FINISHED", "FINISHED"]
    assert [c.data.metrics.get("loss") for c in children] == [3.0, 2.0, None, 1.0, 0.5]
    last = children[-1]
    assert last.data.params["levels"] == "11111"
    assert last.data.params["unit/model.layers.3.proj"] == "1"
    assert (last.data.params["generation"], last.data.tags["parent_trial"]) == ("1", "3")
    assert last.info.end_time - last.info.start_time == 250
    assert children[2].data.tags["reason"] == "broke"


def test_curves_have_one_point_a_trial_and_held_out_steps_are_tokens(folder: Path, runs: Runs, uri: str) -> None:
    from mlflow import MlflowClient

    track(folder)
    client = MlflowClient(tracking_uri=uri)
    (good,) = runs("tags.kind = 'search' and tags.search = 'good-s0'")
    curves = {k: client.get_metric_history(good.info.run_id, k) for k in good.data.metrics}
    assert [(m.step, m.value) for m in curves["search/best_loss"]] == [(0, 3), (1, 2), (2, 2), (3, 1), (4, 0.5)]
    assert [(m.step, m.value) for m in curves["search/trial_loss"]] == [(0, 3), (1, 2), (3, 1), (4, 0.5)]
    assert [(m.step, m.value) for m in curves["held_out/loss"]] == [(500, 0.5)]


def replayed(folder: Path, uri: str, direct: bool) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
    """Runs, and the history of every metric, after a replay."""
    from mlflow import MlflowClient

    replayer = Replayer(folder, lambda: MlflowTracker(uri, "small", direct=direct))
    while replayer.read():
        replayer.step()
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs(["1"], max_results=100)
    histories = {
        (r.info.run_name, k): [(m.value, m.step, m.timestamp) for m in client.get_metric_history(r.info.run_id, k)]
        for r in runs
        for k in r.data.metrics
    }
    return contents(runs), histories


def test_tables_written_directly_equal_those_of_the_api(folder: Path, uri: str, tmp_path: Path) -> None:
    shutil.copy(uri.removeprefix("sqlite:///"), tmp_path / "api.db")
    direct = replayed(folder, uri, direct=True)
    assert len(direct[0]) == 8
    assert direct == replayed(folder, f"sqlite:///{tmp_path / 'api.db'}", direct=False)


def test_tracking_again_adds_nothing(folder: Path, runs: Runs) -> None:
    track(folder)
    before = contents(runs())
    assert track(folder) == 0
    assert contents(runs()) == before
    assert len(runs()) == 8


def test_an_interrupted_search_is_killed_and_then_goes_on(folder: Path, runs: Runs) -> None:
    track(folder)
    cut = "tags.kind = 'search' and tags.search = 'cut-s1'"
    assert runs(cut)[0].info.status == "KILLED"
    script = Script(folder / "journals" / "cut-s1.jsonl", seed=1)
    script.count = 1
    script.write([4.0, 3.0], end=True)
    assert track(folder) == 3
    assert runs(cut)[0].info.status == "FINISHED"
    children = runs("tags.kind = 'trial' and tags.search = 'cut-s1'", "attributes.run_name ASC")
    assert [c.data.metrics["loss"] for c in children] == [5.0, 4.0, 3.0]
    assert not runs("attributes.status = 'RUNNING'")


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("after", range(1, 30, 4))
def test_killed_at_any_write_nothing_is_lost_or_twice(
    folder: Path, uri: str, runs: Runs, monkeypatch: pytest.MonkeyPatch, direct: bool, after: int
) -> None:
    """Every call that changes the store may be the last one of its process."""

    class Killed(BaseException):
        pass

    calls = 0

    def dying(name: str, cls: type) -> Callable[..., Any]:
        original = getattr(cls, name)

        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == after:
                raise Killed
            return original(*arguments, **named)

        return call

    from mlflow import MlflowClient

    with monkeypatch.context() as patch:
        for name in ("create_run", "log_batch", "set_terminated", "set_tag", "log_dict"):
            patch.setattr(MlflowClient, name, dying(name, MlflowClient))
        patch.setattr(RowWriter, "write", dying("write", RowWriter))
        replayer = Replayer(folder, lambda: MlflowTracker(uri, "small", direct=direct))
        try:
            while replayer.read():
                replayer.step()
        except Killed:
            pass
    again = Replayer(folder, lambda: MlflowTracker(uri, "small", direct=direct))
    while again.read():
        again.step()
    again.leave()
    names = sorted(r.info.run_name for r in runs())
    assert names == sorted(["good s0", "cut s1", "cut s1 t0000", *(f"good s0 t{n:04d}" for n in range(5))])
    assert not runs("attributes.status = 'RUNNING'")


def test_a_store_that_fails_for_a_while_is_caught_up(folder: Path, uri: str, runs: Runs) -> None:
    replayer = Replayer(folder, lambda: MlflowTracker(uri, "small"))
    replayer.read()
    replayer.step()
    database = sqlite3.connect(uri.removeprefix("sqlite:///"))
    database.execute("ALTER TABLE params RENAME TO gone")
    database.commit()
    with pytest.raises(TrackingError, match=r"gone|params"):
        replayer.step()
    assert replayer.waiting == 10
    database.execute("ALTER TABLE gone RENAME TO params")
    database.commit()
    database.close()
    while replayer.read():
        replayer.step()
    assert len(runs()) == 8


def test_lines_are_taken_as_the_journal_grows(root: Path, uri: str, runs: Runs) -> None:
    path = root / "comparisons" / "growing" / "journals" / "a-s0.jsonl"
    script = Script(path).write([1.0, 2.0])
    replayer = Replayer(path.parent.parent, lambda: MlflowTracker(uri, "growing"))
    for losses in ([3.0], [4.0, 5.0], [6.0]):
        while replayer.read():
            replayer.step()
        script.write(losses)
    script.write(end=True)
    while replayer.read():
        replayer.step()
    assert len(runs("tags.kind = 'trial'")) == 6
    (parent,) = runs("tags.kind = 'search'")
    assert (parent.info.status, parent.data.metrics["search/best_loss"]) == ("FINISHED", 1.0)


def test_a_running_search_is_left_running(folder: Path, runs: Runs) -> None:
    from evo_hpo.record.journal import Journal

    script = Script(folder / "journals" / "cut-s1.jsonl", seed=1)
    with Journal.open(script.path, script.header, resume=True):
        track(folder)
        assert runs("tags.search = 'cut-s1' and tags.kind = 'search'")[0].info.status == "RUNNING"
    track(folder)
    assert runs("tags.search = 'cut-s1' and tags.kind = 'search'")[0].info.status == "KILLED"


def test_one_journal_can_be_tracked_alone(folder: Path, runs: Runs) -> None:
    assert track(folder / "journals" / "good-s0.jsonl") == 8
    assert len(runs("tags.kind = 'search'")) == 1
    assert track(folder) == 2


def test_a_folder_without_journals_and_a_strange_uri_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journals"):
        track(tmp_path / "nowhere")
    with pytest.raises(TrackingError, match="ftp://x"):
        track(folder, "ftp://x")


def test_new_searches_of_the_same_name_get_their_own_runs(folder: Path, runs: Runs) -> None:
    track(folder)
    (folder / "journals" / "good-s0.jsonl").unlink()
    Script(folder / "journals" / "good-s0.jsonl", seed=5).write([9.0], end=True)
    track(folder)
    assert len(runs("tags.search = 'good-s0' and tags.kind = 'search'")) == 2


def test_large_spaces_have_compact_levels_only(root: Path, uri: str, runs: Runs) -> None:
    Script(root / "comparisons" / "large" / "journals" / "a-s0.jsonl", units=210).write([1.0], end=True)
    track(root / "comparisons" / "large")
    (child,) = runs("tags.kind = 'trial'")
    assert len(child.data.params["levels"]) == 210
    assert not any(k.startswith("unit/") for k in child.data.params)
    (parent,) = runs("tags.kind = 'search'")
    assert sum(k.startswith("unit/") for k in parent.data.params) == 210


def test_the_header_is_an_artifact(folder: Path, root: Path, runs: Runs) -> None:
    track(folder)
    (good,) = runs("tags.kind = 'search' and tags.search = 'good-s0'")
    stored = json.loads((root / "artifacts" / "small" / good.info.run_id / "artifacts" / "header.json").read_text())
    assert stored["search"] == "good-s0"
    assert {"versions", "git", "machine", "space"} <= stored.keys()


def test_an_unknown_schema_is_written_through_the_api(folder: Path, uri: str, runs: Runs, tmp_path: Path) -> None:
    assert RowWriter.supports(Path(uri.removeprefix("sqlite:///")))
    assert not RowWriter.supports(tmp_path / "nothing.db")
    database = sqlite3.connect(tmp_path / "other.db")
    database.execute("CREATE TABLE alembic_version (version_num TEXT)")
    database.execute("INSERT INTO alembic_version VALUES ('another')")
    database.commit()
    database.close()
    assert not RowWriter.supports(tmp_path / "other.db")


def test_a_search_is_found_again_by_its_header(folder: Path, uri: str) -> None:
    tracker = MlflowTracker(uri, "small")
    replay = JournalReplay(folder / "journals" / "good-s0.jsonl")
    replay.read()
    header = {k: v for k, v in replay.waiting[0].items() if k not in ("kind", "format")}
    first, again = tracker.search(header), tracker.search(header)
    other = tracker.search({**header, "created": 5.0})
    assert isinstance(first, MlflowSearch)
    assert first.run_id == again.run_id != other.run_id
