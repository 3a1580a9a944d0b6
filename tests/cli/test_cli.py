"""The command line as a user meets it: help with examples, one-line errors with exit code 2, whole commands."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evo_hpo.cli import comparing
from evo_hpo.cli.commands import app, main
from evo_hpo.cli.options import parse_settings
from evo_hpo.errors import PlanError, TrackingError
from evo_hpo.record.comparison import Comparison
from evo_hpo.run.plan_file import PlanFile
from evo_hpo.search.registry import available_problems, describe_problem, describe_searcher

PLAN = """
name = "tiny"
seeds = [0]
[budget]
evaluations = {evaluations}
[[problems]]
name = "{problem}"
settings = {{ units = {units} }}
[[searchers]]
name = "uniform"
[[searchers]]
name = "evopress"
settings = {{ offspring = 4 }}
"""


def write_plan(folder: Path, evaluations: int = 40, problem: str = "additive", units: int = 8) -> Path:
    """A plan file."""
    path = folder / "tiny.toml"
    path.write_text(PLAN.format(evaluations=evaluations, problem=problem, units=units), encoding="utf-8")
    return path


def run(*arguments: str | Path) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons are run and not drawn: drawing takes longer than they do."""
    monkeypatch.setattr(comparing, "show_report", lambda *_: None)


def names() -> list[str]:
    """Names of all commands."""
    return [c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands]


def test_the_commands_are_the_promised_ones() -> None:
    assert {"build", "search", "compare", "ablate", "report", "track", "ui", "list"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_every_command_explains_itself_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--help") == 0
    assert f"evo-hpo {name}" in " ".join(capsys.readouterr().out.split())


def test_settings_are_read_as_toml_values() -> None:
    read = parse_settings(["offspring=32", "rate=0.5", "invert=true", "tokens=[512, 2048]", "init=uniform", 'a="b c"'])
    assert read == {
        "offspring": 32,
        "rate": 0.5,
        "invert": True,
        "tokens": [512, 2048],
        "init": "uniform",
        "a": "b c",
    }
    with pytest.raises(PlanError, match="KEY=VALUE"):
        parse_settings(["offspring"])


def test_a_comparison_ends_with_a_table_a_picture_and_a_winning_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compare", write_plan(tmp_path), "--root", tmp_path / "runs", "--no-track") == 0
    shown = capsys.readouterr().out
    assert "uniform" in shown
    assert "evopress" in shown
    folder = tmp_path / "runs" / "tiny"
    assert list((folder / "report").glob("*.png"))
    assert list((folder / "report").glob("*.svg"))
    assert json.loads((folder / "profiles" / "winner.json").read_text())["units"]
    assert run("report", folder) == 0


def test_a_single_search_runs_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--problem", "additive", "--evaluations", "30", "--set", "offspring=4", "--problem-set", "units=8"]
    assert run("search", "evopress", *arguments, "--root", tmp_path, "--no-track") == 0
    assert "evopress" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "evopres", "--evaluations", "10", "--problem", "additive"], "did you mean 'evopress'"),
        (["search", "evopress", "--evaluations", "10", "--problem", "additve"], "did you mean 'additive'"),
        (["search", "evopress", "--evaluations", "10", "--problem", "additive", "--set", "lamda=3"], "no setting"),
        (["search", "evopress", "--problem", "additive"], "exactly one of tokens"),
        (["search", "evopress", "--problem", "additive", "--tokens", "100"], "budget of tokens needs"),
        (["search", "evopress", "--problem", "noisy", "--tokens", "1"], "does not pay for"),
        (["compare", "nowhere.toml"], "no plan at nowhere.toml"),
        (["compare"], "Missing argument"),
        (["report", "nowhere"], "not a comparison's folder"),
        (["list", "additiv"], "did you mean 'additive'"),
        (
            [
                "search",
                "evopress",
                "--evaluations",
                "9",
                "--problem",
                "additive",
                "--tracking-uri",
                "sqlite:////proc/x/m",
            ],
            "choose another place",
        ),
        (["list", "nobody"], "unknown searcher or problem 'nobody'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.strip().count("\n") == 0
    assert "Traceback" not in shown.out + shown.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_everything_and_says_how_to_resume(tmp_path: Path, number: signal.Signals) -> None:
    plan = write_plan(tmp_path, evaluations=200_000, problem="interacting", units=40)
    arguments = ["compare", str(plan), "--root", str(tmp_path), "--no-track"]
    process = subprocess.Popen(
        [sys.executable, "-m", "evo_hpo.cli.commands", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits "ignore"
    )
    journal = tmp_path / "tiny" / "journals" / "evopress-s0.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size > 20_000):
        time.sleep(0.02)
    if number == signal.SIGINT:  # Ctrl-C reaches every process of the terminal, SIGTERM the one that is named
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    try:
        shown, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 130
    assert f"evo-hpo compare {plan} --root {tmp_path} --no-track --resume" in shown
    assert "Traceback" not in shown
    assert journal.read_text().count('"kind":"outcome"') > 10


@pytest.mark.usefixtures("unreported")
def test_what_the_command_line_changed_is_in_the_plan_that_is_kept(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    plan.write_text(plan.read_text().replace('[[searchers]]\nname = "uniform"\n', ""))
    options = ("--root", tmp_path, "--no-track", "--workers", "1")
    assert run("ablate", plan, "--vary", "offspring=2,8", *options) == 0
    assert run("search", "evopress", "--problem", "additive", "--problem-set", "units=8", "--evaluations", "20",
               "--set", "offspring=2", "--name", "one", *options[:3]) == 0  # fmt: skip
    for name in ("tiny-ablation", "one"):
        kept = PlanFile.read(tmp_path / name / "plan.toml").plan()
        started = json.loads((tmp_path / name / "comparison.json").read_text())["plan"]
        assert kept.name == name
        expected = [s for s in started["searchers"] if s["name"] != "uniform"]
        assert [(s.key, s.settings) for s in kept.searchers] == [
            (s.get("label") or s["name"], s["settings"]) for s in expected
        ]
    searches = json.loads((tmp_path / "tiny-ablation" / "comparison.json").read_text())["searches"]
    assert "uniform" in {s["searcher"] for s in searches}  # always in the table


def test_where_to_write_and_what_to_resume_is_settled_before_anything_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> None:
        raise AssertionError("level stores would be built")

    monkeypatch.setattr(comparing, "prepare", build)
    plan, root = write_plan(tmp_path), tmp_path / "runs"
    for options, words in (
        (("--root", root, "--resume"), "nothing to resume"),
        (("--root", plan), "cannot make the folder"),
    ):
        assert run("compare", plan, "--no-track", *options) == 2
        assert words in capsys.readouterr().err
    assert not root.exists()
    Comparison.start(root / "tiny", PlanFile.read(write_plan(tmp_path, evaluations=50)).plan().plain(), [])
    write_plan(tmp_path)
    assert run("compare", plan, "--no-track", "--root", root, "--resume") == 2
    assert "started with another plan" in capsys.readouterr().err


@pytest.mark.usefixtures("unreported")
def test_commands_that_are_told_go_to_the_store_that_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise TrackingError("no")

    monkeypatch.setattr(comparing, "_tracking", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr("evo_hpo.tracking.log_comparison", refuse)
    root, uri = tmp_path / "a b", f"sqlite:///{tmp_path}/my store.db"
    assert run("compare", write_plan(tmp_path), "--root", root, "--tracking-uri", uri) == 0
    told = capsys.readouterr().out.splitlines()
    (again,) = (line.partition("; repeat with: ")[2] for line in told if line.startswith("not in MLflow: no;"))
    assert shlex.split(again) == ["evo-hpo", "track", str(root / "tiny"), "--tracking-uri", uri]
    (browse,) = (line.removeprefix("browse the runs: ") for line in told if line.startswith("browse"))
    assert shlex.split(browse) == ["evo-hpo", "ui", "--tracking-uri", uri]


@pytest.mark.parametrize(
    ("uri", "message"), [("mlruns/mine", "tracking URI 'mlruns/mine' is not usable"), ("sqlite:////proc/x/m", "choose")]
)
def test_a_store_of_the_environment_is_checked_before_the_searches(
    uri: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    command = ["search", "evopress", "--evaluations", "9", "--problem", "additive"]
    assert run(*command) == 2
    assert message in capsys.readouterr().err
    assert not [*tmp_path.rglob("*.jsonl")]
    assert run(*command, "--no-track") == 0


def test_list_shows_searchers_problems_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    shown = capsys.readouterr().out
    for name in ("evopress", "uniform", "optuna:", "nevergrad:", "additive", "smollm2"):
        assert name in shown
    assert run("list", "evopress") == 0
    assert "offspring" in capsys.readouterr().out


def test_what_cannot_work_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write_plan(tmp_path)
    for arguments, words in (
        (("compare", plan, "--no-track", "--root", plan), "cannot make the folder"),
        (("track", plan), "no journals"),
        (("list", "nevergrad:DiscreteOnePlusTwo"), "or 'nevergrad:DiscreteOnePlusOne'"),
        (("search", "evopress", "--problem", "additive", "--evaluations", "9", "--set", "offsprings=2"), "'offspring'"),
    ):
        assert run(*arguments) == 2
        shown = capsys.readouterr().err
        assert words in " ".join(shown.split())
        assert "Traceback" not in shown
    assert {p.name for p in tmp_path.iterdir()} == {plan.name}
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("evo-hpo ")


@pytest.mark.usefixtures("unreported")
def test_resume_finds_the_comparison_of_this_plan_among_those_of_its_name(tmp_path: Path) -> None:
    options = ("--root", tmp_path, "--no-track", "--workers", "1")
    plan = write_plan(tmp_path)
    assert run("compare", plan, *options) == 0
    write_plan(tmp_path, evaluations=50)
    assert run("compare", plan, *options) == 0
    before = (tmp_path / "tiny" / "journals" / "evopress-s0.jsonl").read_text()
    write_plan(tmp_path)
    assert run("compare", plan, "--resume", *options) == 0
    assert (tmp_path / "tiny" / "journals" / "evopress-s0.jsonl").read_text() == before
    assert not (tmp_path / "tiny-3").exists()


@pytest.mark.parametrize("name", ["evopress", "optuna:tpe", "interacting", "noisy", "smollm2", "tabular"])
def test_every_setting_is_explained(name: str) -> None:
    described = describe_problem(name) if name in available_problems() else describe_searcher(name)
    assert [key for key in described.settings if not described.meanings.get(key)] == []
