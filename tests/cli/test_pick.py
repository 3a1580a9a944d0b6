"""``evo-hpo pick``: what is taken of a front, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.problems.synthetic import additive, noisy
from evo_hpo import Budget, CompressionSpace, FunctionProblem, Unit
from evo_hpo.record.comparison import Comparison
from evo_hpo.record.profiles import open_profile
from evo_hpo.space.ranges import spanning
from tests.cli.test_cli import run
from tests.report.synthetic import write_folder

SETTINGS = {"units": 14, "tightness": 0.2, "tightest": 0.9, "unequal": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uniform and a search over a range."""
    made = tmp_path_factory.mktemp("pick")
    searchers: list[tuple[str, str, dict[str, Any]]] = [(n, n, {}) for n in ("uniform", "evopress_front")]
    return write_folder(made, [noisy(**SETTINGS)], searchers, (0,), Budget(tokens=1024 * 200))


@pytest.mark.parametrize("searcher", [None, "uniform"])
def test_the_dearest_point_within_the_budget_is_a_profile(
    folder: Path, tmp_path: Path, searcher: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [] if searcher is None else ["--searcher", searcher]
    assert run("pick", folder, tmp_path / "point.json", "--average", "2.5", *options) == 0
    comparison = Comparison.read(folder)
    space = comparison.problems["noisy"].space
    data, levels = open_profile(tmp_path / "point.json", space)
    record = next(r for r in comparison.records() if r.searcher == data["searcher"])
    assert data["searcher"] == searcher or searcher is None
    fitting = [p for p in record.checkpoints[-1].front if p.cost <= 2.5 * space.total_size]
    assert levels == fitting[-1].levels
    assert data["held_out"] == fitting[-1].held_out
    assert data["cost"] == fitting[-1].cost
    assert "export it with: evo-hpo export" in capsys.readouterr().out


def test_without_a_name_it_lies_beside_the_other_profiles(folder: Path) -> None:
    assert run("pick", folder, "--average", "3") == 0
    picked = folder / "profiles" / "picked-3.json"
    first = json.loads(picked.read_text())
    assert first["average"] <= 3
    other = "uniform" if first["searcher"] != "uniform" else "evopress_front"
    assert run("pick", folder, "--average", "3", "--searcher", other) == 2
    assert json.loads(picked.read_text()) == first
    assert run("pick", folder, "--average", "3", "--searcher", first["searcher"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--average", "1.0"], "nothing on the front of evopress_front fits 1.0: give from 1."),
        (["--average", "many"], "--average 'many' must be a number, such as 3.2"),
        (["--average", "1e999999999"], "--average '1e999999999' must be a number, such as 3.2"),
        ([], "give --average or --size, one of them"),
        (["--average", "3", "--size", "4 MB"], "give --average or --size, one of them"),
        (["--size", "4"], "--size='4' must be a size above 0 with its unit"),
        (["--size", "4 MB"], "problem 'noisy', which has no model to export"),
        (["--average", "3", "--searcher", "random"], "no front of a searcher 'random'; there are: "),
        (["--average", "3", "--problem", "other"], "no front of a problem 'other'; there are: noisy"),
    ],
)
def test_what_cannot_be_taken_is_said_in_a_line(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pick", folder, *options) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert error.count("\n") == 1


def test_a_profile_that_is_there_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "winner.json"
    kept.write_text("kept")
    assert run("pick", folder, kept, "--average", "3") == 2
    assert kept.read_text() == "kept"
    assert run("pick", folder, kept / "below.json", "--average", "3") == 2
    assert run("pick", folder, "--average", "7/2") == 0
    assert (folder / "profiles" / "picked-72.json").is_file()
    (folder / "profiles" / "picked-72.json").write_text("{")
    assert run("pick", folder, "--average", "7/2") == 2
    assert (folder / "profiles" / "picked-72.json").read_text() == "{"


def test_a_comparison_at_one_budget_has_nothing_to_pick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_folder(tmp_path, [additive(units=5)], [("uniform", "uniform", {})], (0,), Budget(evaluations=3))
    assert run("pick", made, "--average", "3") == 2
    assert "has no front: its plan has no range of budgets" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("resource", "costs", "asked", "most", "told"),
    [
        ("modules", (0, 1), "5", 9, "5 modules dropped"),
        ("modules", (0, 1), "4.5", 9, "5 modules dropped"),
        ("weights", (0, 500, 1000), "0.25", 10_500, "0.25 of the weights removed"),
    ],
)
def test_a_point_is_asked_for_as_the_plan_says_its_range(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    resource: str,
    costs: tuple[int, ...],
    asked: str,
    most: int,
    told: str,
) -> None:
    size = costs[-1]
    units = [Unit(f"layers.{i}.unit", costs=costs, size=size) for i in range(14)]
    ends = (CompressionSpace(units, size * kept, resources=(resource,)) for kept in (7, 13))
    problem = FunctionProblem(spanning(*ends), lambda levels: float(-sum(levels)))
    made = write_folder(tmp_path / "runs", [problem], [("uniform", "uniform", {})], (0,), Budget(evaluations=50))
    assert run("pick", made, tmp_path / "point.json", "--average", asked) == 0
    assert json.loads((tmp_path / "point.json").read_text())["cost"] == most
    assert told in " ".join(capsys.readouterr().out.split())
