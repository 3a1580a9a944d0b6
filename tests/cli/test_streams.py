"""Output that goes nowhere, and work that fails in a way nobody expected: what is shown is never worth the work."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evo_hpo.cli import comparing
from evo_hpo.cli.commands import main
from evo_hpo.record.comparison import Comparison
from evo_hpo.run import schedule
from evo_hpo.run.events import SearchFailed
from tests.cli.test_cli import run, write_plan

UNDRAWN = """
import sys, types
import evo_hpo.cli.commands
report, results = types.ModuleType("evo_hpo.report"), types.ModuleType("evo_hpo.report.results")
report.final_table = lambda results: "held-out loss ↓ –"
def write_report(folder):
    (folder / "report" / "report.html").write_text("<p>")
    return folder / "report" / "report.html"
report.write_report = write_report
results.Results = types.SimpleNamespace(load=lambda folder: folder)
sys.modules |= {"evo_hpo.report": report, "evo_hpo.report.results": results}
evo_hpo.cli.commands.main()
"""
"""The command line with nothing of the report but its end: pictures take longer than all the rest of the command."""


def in_a_shell(folder: Path, tail: str, *, drawn: bool, **environment: str) -> subprocess.CompletedProcess[str]:
    """A comparison in a shell, with something after it, with its own exit code."""
    write_plan(folder)
    arguments = "compare tiny.toml --no-track --workers 1"
    (folder / "undrawn.py").write_text(UNDRAWN, encoding="utf-8")
    program = "-m evo_hpo.cli.commands" if drawn else "undrawn.py"
    command = f"set -o pipefail; '{sys.executable}' {program} {arguments} {tail}"
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("tail", "environment", "drawn"),
    [
        ("| head -1", {}, False),
        (">&-", {}, False),
        (">/dev/full", {}, False),
        ("", {"PYTHONIOENCODING": "ascii"}, True),
        (">&- 2>&-", {}, True),
    ],
    ids=["a pipe that is closed", "closed", "a full disk", "ASCII only", "both closed"],
)
def test_a_search_ends_well_wherever_its_output_goes(
    tmp_path: Path, tail: str, environment: dict[str, str], drawn: bool
) -> None:
    done = in_a_shell(tmp_path, tail, drawn=drawn, **environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    comparison = Comparison.read(tmp_path / "mlruns" / "comparisons" / "tiny")
    assert [record.finished for record in comparison.records()] == [True, True]
    assert (comparison.folder / "report" / "report.html").exists()


def test_what_nobody_expected_is_one_line_with_the_trace_and_what_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr(comparing, "show_report", broken)
    plan = write_plan(tmp_path)
    assert run("compare", plan, "--no-track", "--root", tmp_path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "unexpected ZeroDivisionError: first second" in line
    assert f"kept in {tmp_path / 'tiny'}" in line
    trace = Path(line.split("the trace is in ")[1].split(";")[0])
    assert "in broken" in trace.read_text(encoding="utf-8")
    trace.unlink()
    assert Comparison.read(tmp_path / "tiny").winner_files()


def test_an_unexpected_error_in_the_midst_of_a_search_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(comparing, "compare", broken)
    assert run("compare", write_plan(tmp_path), "--no-track", "--root", tmp_path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert "--resume" in line
    Path(line.split("the trace is in ")[1].split(";")[0]).unlink()


@pytest.mark.parametrize("what", ["folder", "nothing", "a list", "no levels", "held out of another kind"])
def test_a_profile_that_is_none_is_refused_in_one_line(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {
        "a list": "[]",
        "no levels": "{}",
        "held out of another kind": '{"levels": [0], "units": {"a": "0"}, "problem": {"name": "smollm2"}, "average": 3,'
        ' "held_out": []}',
    }
    path = tmp_path if what == "folder" else tmp_path / "profile.json"
    if what in texts:
        path.write_text(texts[what], encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["export", str(path), str(tmp_path / "out")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "profile" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "place", "safe"),
    [
        (
            ["build", "--model", "m"],
            "levels.build.build",
            "units that were built are kept in {folder}/store,",
        ),
        (
            ["export", "profile.json", "out"],
            "export.folder.export_profile",
            "out was not made; the profile and the",
        ),
        (["report", "folder"], "cli.comparing.show_report", "journals and level stores that were on disk are as they"),
        (["track", "folder"], "tracking.track", "journals and level stores that were on disk are as they were"),
    ],
)
def test_every_command_says_what_is_safe_on_disk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    place: str,
    safe: str,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError("no memory is left")

    monkeypatch.setattr(f"evo_hpo.{place}", broken)
    monkeypatch.setattr("evo_hpo.cli.building.build", broken)
    output = ["--output", str(tmp_path / "store")] if command[0] == "build" else []
    assert run(*command, *output) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "unexpected MemoryError: no memory is left" in line
    assert safe.format(folder=tmp_path) in line
    Path(line.split("the trace is in ")[1].split(";")[0]).unlink()


@pytest.mark.parametrize(("trace", "code"), [("Traceback (most recent call last):\n", 1), ("", 2)])
def test_a_search_that_fails_for_a_reason_that_nobody_knows_is_no_fault_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trace: str, code: int
) -> None:
    failed = contextlib.nullcontext(iter([SearchFailed("uniform-s0", "TypeError: 'NoneType'", trace)]))
    monkeypatch.setattr(schedule, "_processes", lambda *_: failed)
    assert run("compare", write_plan(tmp_path), "--no-track", "--root", tmp_path) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert "uniform-s0: TypeError: 'NoneType'" in line
    assert "--resume" in line
    assert (f"the trace is in {tmp_path / 'tiny' / 'errors.log'}" in line) == bool(trace)
