"""Levels, and so sizes and budgets, told before a store is built: they are those that are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomlkit
from typer.testing import CliRunner

from evo_hpo.cli.commands import app
from evo_hpo.errors import InfeasibleError, InvalidSettingError
from evo_hpo.export.folder import task_of
from evo_hpo.scoring.expected_levels import expected_levels
from evo_hpo.scoring.score_cache import ScoreCache, check_cache
from evo_hpo.scoring.task import language_model
from evo_hpo.search.registry import prepare_problem
from tests.export.test_packed import cache, mixtral, model, settings

__all__ = ["cache", "mixtral", "model"]


def test_sizes_are_told_before_anything_is_built_as_they_are_built(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = settings(model, serve="vllm", levels=[3, 4, 8], size="0.06 MB")
    task = language_model.task(problem)
    with monkeypatch.context() as patch:
        patch.setenv("EVO_HPO_CACHE", str(tmp_path / "nothing"))
        planned = expected_levels(task)
        assert not (tmp_path / "nothing").exists()
        for build in ({"group_size": 24, "symmetric": False}, {"group_size": 0}):
            asked = language_model.task(settings(model, build=build, resource="storage"))
            ahead = expected_levels(asked).units
            asked.ensure_store(lambda *_: None)
            assert ahead == asked.open_levels().units
        steps = {"method": "magnitude", "levels": [0.5], "average": 0.5, "build": {"step": 300, "steps": 3}}
        stepped = language_model.task(settings(model, **steps))
        sparse = expected_levels(stepped).units
        assert len({unit.levels for unit in sparse}) > 1
        stepped.ensure_store(lambda *_: None)
        assert sparse == stepped.open_levels().units
        dropping = language_model.task(settings(model, method="drop", levels=[], average=1, build={}))
        modules = expected_levels(dropping).units
        dropping.ensure_store(lambda *_: None)
        assert modules == dropping.open_levels().units
    prepare_problem("language_model", problem, lambda *_: None)
    assert planned.units == task.open_levels().units
    plan = {"name": "p", "seeds": [0], "budget": {"tokens": 64}, "searchers": [{"name": "uniform"}]}
    (tmp_path / "plan.toml").write_text(
        tomlkit.dumps(plan | {"problems": [{"name": "language_model", "settings": problem}]})
    )
    told = CliRunner().invoke(app, ["sizes", str(tmp_path / "plan.toml"), "--context", "100"]).output
    assert "asked: 0.06 MB" in told
    assert "uniform 8" in told
    for wrong in ({"model": 0}, {"modell": "m"}):
        task_settings = problem | wrong
        with pytest.raises(InvalidSettingError, match=next(iter(wrong))):
            task_of({"problem": {"name": "language_model", "settings": task_settings}})
    assert "cache: 0.0128 MB" in told  # keys and values of 2 blocks, 1 head of 16: 64 numbers, 2 bytes, 100 tokens


@pytest.mark.parametrize(
    ("method", "build", "own", "message"),
    [
        (
            "gptq",
            {"group_size": 16},
            {"size": "1 kB", "levels": [3, 4, 8]},
            r"size='1 kB' is outside .* 0\.\d+ MB to 0.* MB .*; uniform 3: 0.*; uniform 4: 0.*; uniform 8: 0",
        ),
        (
            "rtn",
            {"group_size": 16},
            {"average": 12.0, "levels": [3, 4], "resource": "storage"},
            r"average=12.0 .*: lowest 4.5, uniform 3 4.5, highest 5.5, uniform 4 5.5$",
        ),
        (
            "ggml",
            {"calibration_tokens": 64, "sequence_length": 16, "embedding": True},
            {"average": 2, "levels": ["Q4_0", "Q8_0"]},
            r"average=2 is not what the levels allow .*: lowest 4.5, uniform Q4_0 4.5, highest 8.5, uniform Q8_0 8.5$",
        ),
    ],
)
def test_a_budget_that_the_levels_will_not_allow_is_told_before_they_are_built(
    method: str, build: dict[str, Any], own: dict[str, Any], message: str, mixtral: Path, tmp_path: Path
) -> None:
    """Of levels that become those that were expected."""
    problem = settings(mixtral, method=method, build=build, store=str(tmp_path / "store"), **own)
    with pytest.raises(InfeasibleError, match=message):
        prepare_problem("language_model", problem, lambda *_: None)
    assert not (tmp_path / "store").exists()
    if method == "ggml":
        task = language_model.task(problem | {"average": 5})
        ahead = expected_levels(task).units
        task.ensure_store(lambda *_: None)
        assert ahead == task.open_levels().units
        assert ahead[0].name == "model.embed_tokens"


@pytest.mark.parametrize(("method", "levels", "average"), [("wanda", [0.25, 0.5], 0.4), ("drop", [], 1)])
def test_levels_are_expected_whatever_else_their_build_is_told(
    method: str, levels: list[float], average: float, model: Path, tmp_path: Path
) -> None:
    build = {} if method == "drop" else {"calibration_tokens": 64, "sequence_length": 16, "seed": 3}
    problem = settings(model, method=method, levels=levels, average=average, build=build, store=str(tmp_path / "store"))
    task = language_model.task(problem)
    ahead = expected_levels(task).units
    task.ensure_store(lambda *_: None)
    assert ahead == task.open_levels().units


def test_sizes_of_levels_that_cannot_be_are_refused_as_their_build_refuses_them(model: Path, tmp_path: Path) -> None:
    for levels in ([2.5, 3], [3, 3], [9]):
        task = language_model.task(settings(model, levels=levels, store=str(tmp_path / "none")))
        with pytest.raises(InvalidSettingError, match="bit-width"):
            expected_levels(task)


@pytest.mark.parametrize("what", ["folder", "text", "below a file"])
def test_a_cache_that_cannot_be_used_is_told_before_levels_are_built(what: str, model: Path, tmp_path: Path) -> None:
    named = {"folder": tmp_path, "text": tmp_path / "a.txt", "below a file": tmp_path / "a.txt" / "losses.db"}[what]
    (tmp_path / "a.txt").write_text("no database, but text that is long enough to be looked at" * 20)
    problem = settings(model, store=str(tmp_path / "store"), cache=str(named))
    with pytest.raises(InvalidSettingError, match="cache=.* cannot be used"):
        prepare_problem("language_model", problem, lambda *_: None)
    assert not (tmp_path / "store").exists()


def test_a_cache_is_looked_at_without_a_trace(tmp_path: Path) -> None:
    file = tmp_path / "new" / "losses.db"
    check_cache(file)
    assert not file.parent.exists()
    ScoreCache(file, "context").close()
    check_cache(file)
    assert [each.name for each in file.parent.iterdir()] == ["losses.db"]


def test_a_cache_behind_a_closed_door_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(InvalidSettingError, match="cache=.* cannot be used .*Permission denied"):
        check_cache(tmp_path / "losses.db")
