"""What the UI shows of a comparison: its own run, views, winners, and the server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evo_hpo.errors import TrackingError
from evo_hpo.record.journal import read_journals
from evo_hpo.tracking import log_comparison, track
from evo_hpo.tracking.mlflow_tracker import MlflowTracker
from evo_hpo.tracking.ui import launch_ui, server_command
from evo_hpo.tracking.views import differing_units, link, views
from tests.tracking.conftest import Runs, Script


def test_a_comparison_has_its_own_run_views_and_banner(folder: Path, uri: str, root: Path) -> None:
    (folder / "report").mkdir()
    (folder / "report" / "report.html").write_text("<p>table</p>")
    (folder / "profiles").mkdir()
    (folder / "profiles" / "winner.json").write_text(json.dumps({"search": "good-s0", "held_out": {"loss": 0.5}}))
    plan = {"name": "small", "seeds": [0], "description": "d" * 7000}
    (folder / "comparison.json").write_text(json.dumps({"plan": plan}))
    (folder / "plan.toml").write_text("name = 'small'")
    track(folder)
    run = log_comparison(folder)
    assert log_comparison(folder) == run
    client = MlflowTracker(uri, "small").client
    found = client.get_run(run)
    assert (found.info.run_name, found.info.status) == ("small comparison", "FINISHED")
    assert found.data.metrics == {"held_out/loss": 0.5}
    artifacts = root / "artifacts" / "small" / run / "artifacts"
    assert {p.name for p in artifacts.rglob("*") if p.is_file()} == {
        "plan.toml",
        "comparison.json",
        "report.html",
        "winner.json",
    }
    tags = client.get_experiment_by_name("small").tags  # type: ignore[union-attr]
    assert link("1") in tags["mlflow.note.content"]
    assert "winner: good-s0, held-out loss 0.5" in tags["mlflow.note.content"]
    assert {"searches", "curves", "trials", "winner", "levels"} == {
        k.removeprefix("mlflow.sharedViewState.") for k in tags if k.startswith("mlflow.sharedViewState.")
    }


def test_a_comparison_of_another_plan_under_the_same_name_has_a_run_of_its_own(folder: Path, uri: str) -> None:
    client = MlflowTracker(uri, "small").client

    def logged(**plan: object) -> tuple[str, dict[str, str]]:
        (folder / "comparison.json").write_text(json.dumps({"plan": plan}))
        run = log_comparison(folder)
        return run, {k.removeprefix("plan/"): v for k, v in client.get_run(run).data.params.items()}

    first, params = logged(name="small", workers=1, budget={"tokens": 10})
    assert params == {"name": "small", "workers": "1", "budget/tokens": "10"}
    assert logged(name="small", workers=2, budget={"tokens": 10}, description="resumed")[0] == first
    other, params = logged(name="small", workers=1, budget={"tokens": 20})
    assert params == {"name": "small", "workers": "1", "budget/tokens": "20"}
    third, params = logged(name="small", workers=1, budget={"evaluations": 10})
    assert params == {"name": "small", "workers": "1", "budget/evaluations": "10"}
    assert len({first, other, third}) == 3
    assert logged(name="small", workers=1, budget={"tokens": 10})[0] == first


def test_losses_of_different_problems_are_not_put_in_one_order(root: Path, uri: str, runs: Runs) -> None:
    folder = root / "comparisons" / "two"
    losses = {"easy-a-s0": 0.01, "easy-b-s0": 0.02, "hard-a-s0": 5.0, "hard-b-s0": 4.0}
    for search, loss in losses.items():
        script = Script(folder / "journals" / f"{search}.jsonl")
        script.header |= {"problem": search[:4], "label": search[5]}
        script.write([loss, loss + 1], checkpoint=True, end=True)
    with (folder / "journals" / "hard-b-s0.jsonl").open() as file:
        lines = [json.loads(line) for line in file]
    lines[-2]["held_out"] = {"loss": 0.4}  # b is better on the hard problem, a is first on the easy one
    (folder / "journals" / "hard-b-s0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    track(folder)
    made = {v.id: v for v in views(read_journals(folder))}
    for mark, problem in (("", "easy"), ("-2", "hard")):
        best = runs(made[f"trials{mark}"].where, f"{made[f'trials{mark}'].order} ASC")
        own = sorted(x for s, loss in losses.items() if s.startswith(problem) for x in (loss, loss + 1))
        assert [r.data.metrics["loss"] for r in best] == own
        assert problem in made[f"trials{mark}"].name
        assert made[f"levels{mark}"].where.endswith(f"tags.problem = '{problem}'")
    assert made["winner"].name == "Trials of easy-a-s0"
    assert made["winner-2"].name == "Trials of hard-b-s0"
    assert made["searches"].columns[0] == "params.`problem`"


def test_each_problem_has_its_winner_in_the_banner_and_figures_of_its_own(folder: Path, uri: str) -> None:
    (folder / "profiles").mkdir()
    for problem, loss in (("easy", 0.25), ("hard", 4.0)):
        profile = {"search": f"{problem}-s0", "problem": {"name": "p", "label": problem}, "held_out": {"loss": loss}}
        (folder / "profiles" / f"winner-{problem}.json").write_text(json.dumps(profile))
    run = MlflowTracker(uri, "small").client.get_run(log_comparison(folder))
    assert run.data.metrics == {"held_out/easy/loss": 0.25, "held_out/hard/loss": 4.0}
    note = run.data.tags["mlflow.note.content"]
    assert "winner on easy: easy-s0, held-out loss 0.25" in note
    assert "winner on hard: hard-s0, held-out loss 4" in note


def test_views_hold_what_the_ui_reads(folder: Path) -> None:
    import base64
    import zlib

    records = read_journals(folder)
    for view in views(records):
        assert len(view.value()) < 5000
        envelope = json.loads(view.value())
        assert isinstance(envelope["name"], str)
        assert isinstance(envelope["createdAt"], int)
        state = json.loads(zlib.decompress(base64.b64decode(envelope["state"].removeprefix("deflate;"))))
        assert state["searchFilter"].startswith("tags.kind")
        sections = {s["uuid"] for s in state.get("compareRunSections", [])}
        assert {c["metricSectionId"] for c in state.get("compareRunCharts", [])} == sections
    assert differing_units(records, most=2) == ["model.layers.0.proj", "model.layers.1.proj"]


def test_the_ui_serves_on_loopback_with_safe_settings(root: Path, uri: str) -> None:
    command = " ".join(server_command(uri, 5050))
    assert "--host 127.0.0.1 --port 5050 --workers 1 --no-serve-artifacts" in command
    assert "--allowed-hosts 127.0.0.1:5050,localhost:5050" in command
    assert f"--default-artifact-root file://{root}/artifacts" in command
    with pytest.raises(TrackingError, match="nothing is tracked here yet"):
        launch_ui(f"sqlite:///{root / 'other.db'}")


@pytest.mark.parametrize("port", [-1, 0, 65536, 99999])
def test_a_port_that_is_none_is_refused(uri: str, port: int) -> None:
    with pytest.raises(TrackingError, match=f"^{port} is no port: give one from 1 to 65535 with --port"):
        launch_ui(uri, port)
