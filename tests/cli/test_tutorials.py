"""Every tutorial, run as its reader would: files written, Python executed, commands given.

Commands are given in this process; what they do in one of their own is tested with their output and interrupts.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evo_hpo.levels.build import default_folder
from evo_hpo.run.plan_file import PlanFile
from evo_hpo.scoring.task import LanguageModelTask
from tests.cli.test_cli import run as command
from tests.tiny import save_tiny

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
README = Path(__file__).parents[2] / "README.md"


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file that it is to be saved as, its text."""

    language: str
    file: str
    text: str


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = re.findall(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    return [Block(*b) for b in found]


def follow(path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Does what the page says, in the folder that this process is in; the output of everything."""
    shown = ""
    for block in blocks(path):
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
            if block.file.startswith("test_"):
                shown += run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", block.file], folder)
        elif block.language == "python":
            shown += run([sys.executable, "-c", block.text], folder)
        elif block.language == "console":
            for line in block.text.splitlines():
                words = shlex.split(line)
                assert words[0] == "evo-hpo"
                assert command(*words[1:]) == 0, capsys.readouterr()
                shown += capsys.readouterr().out
    return shown


def run(command: list[str], folder: Path) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("compare-two-algorithms", "uniform"),
        ("add-a-searcher", "passed"),
        ("add-a-problem", "layers.9.mlp"),
        ("ablate-evopress", "fixed 7"),
    ],
)
def test_tutorials_do_what_they_say(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in follow(TUTORIALS / f"{name}.md", tmp_path, capsys)


def test_the_plan_for_a_large_model_is_valid(tmp_path: Path) -> None:
    plan = next(b for b in blocks(TUTORIALS / "seven-billion.md") if b.file)
    (tmp_path / plan.file).write_text(plan.text, encoding="utf-8")
    PlanFile.read(tmp_path / plan.file).plan().check()


def test_the_store_that_is_built_by_hand_for_a_large_model_is_the_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = blocks(TUTORIALS / "seven-billion.md")
    settings = tomllib.loads(next(b for b in page if b.file).text)["problems"][0]["settings"]
    line = next(b.text for b in page if b.language == "sh" and b.text.startswith("evo-hpo build"))
    given: dict[str, Any] = {}
    monkeypatch.setattr("evo_hpo.cli.building.build_from_cli", lambda _, **named: given.update(named))
    assert command(*shlex.split(line.replace("\\\n", ""))[1:]) == 0
    assert given["model"] == settings["model"]
    model = str(save_tiny(tmp_path))
    task = LanguageModelTask(**settings | {"model": model})
    assert task.store_folder == default_folder(model, given["method"], given["levels"].split(","), given["settings"])


@pytest.mark.filterwarnings("ignore")  # as a process of its own would
def test_the_example_in_the_readme_runs_and_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    example = next(b for b in blocks(README) if b.language == "python")
    assert len(example.text.splitlines()) < 25
    exec(compile(example.text, README, "exec"), {"__name__": "__main__"})
    assert "evopress" in capsys.readouterr().out
