"""A comparison on a (tiny, random) language model, from model folder to exported model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evo_hpo.cli.commands import main
from evo_hpo.errors import EvoHpoError, TextError
from evo_hpo.export.folder import export_profile
from evo_hpo.record.comparison import Comparison
from evo_hpo.record.journal import read_journals
from evo_hpo.report import Findings
from evo_hpo.report.scoring_sheet import scoring_sheet
from evo_hpo.run.plan import Plan, make_plan
from evo_hpo.run.rehearsal import rehearse
from evo_hpo.run.schedule import compare
from evo_hpo.scoring import task
from evo_hpo.scoring.factory import Factory
from evo_hpo.scoring.file_size import FileSize
from evo_hpo.scoring.task import language_model
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.registry import make_problem, prepare_problem, preview_problem
from tests.tiny import save_tiny


def rehearse_and_prepare(problem: dict[str, Any], plan: Plan) -> None:
    """What every command does before it searches."""
    rehearse(plan, preview_problem("language_model", problem))
    prepare_problem("language_model", problem, lambda *_: None)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block Llama with random weights and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    return save_tiny(folder)


def settings(folder: Path, store: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a problem on the tiny model."""
    return {
        "model": str(folder),
        "store": str(store),
        "build": {"group_size": 16},
        "levels": [2, 3, 4],
        "average": 3.0,
        "sequence_length": 16,
        "calibration_tokens": 512,
        "held_out_tokens": 128,
        "dtype": "float32",
        "tokens": 64,
    } | changes


@pytest.mark.parametrize(
    ("method", "average", "levels"),
    [("magnitude", 0.6, 5), ("drop", 1, 2), ("rtn", 3.0, 5)],
)
def test_a_method_alone_brings_levels_of_its_own(
    method: str, average: float, levels: int, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    usual = settings(model_folder, tmp_path / "store", method=method, average=average)
    del usual["levels"], usual["build"]
    problem = Factory(task.LanguageModelTask, "tiny", build={"group_size": 8})  # as of bit-widths alone
    preview = problem.preview(usual)
    assert preview.tokens == 64
    problem.prepare(usual, lambda *_: None)
    made = problem(**usual)
    assert {len(unit.levels) for unit in made.space.units} == {levels}
    assert problem.task(usual).build == ((("group_size", 8),) if method == "rtn" else ())


def plan_of(problem: dict[str, Any], **changes: Any) -> Plan:
    """Uniform and EvoPress on it."""
    data = {
        "name": "tiny",
        "seeds": [0],
        "workers": 1,
        "budget": {"tokens": 2048},
        "problems": [{"name": "language_model", "label": "tiny", "settings": problem}],
        "searchers": [
            {"name": "uniform"},
            {"name": "evopress", "settings": {"offspring": 4, "survivors": [2, 1], "tokens": [32, 64]}},
        ],
    }
    return make_plan(data | changes)


def test_from_model_to_winning_profile_to_exported_model(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    problem = settings(model_folder, tmp_path / "store")
    plan = plan_of(problem)
    plan.check()
    rehearse_and_prepare(problem, plan)
    folder = compare(plan, root=tmp_path / "runs")
    record = json.loads((folder / "comparison.json").read_text())
    assert record["problems"]["tiny"]["reference"]["loss"] == pytest.approx(0.0, abs=1e-6)
    comparison = Findings.load(folder)
    sheet = scoring_sheet(comparison, "tiny")
    assert sheet is not None
    assert len(sheet.rows) == len(comparison.runs)
    assert all("float32" in row[1] or "bfloat16" in row[1] for row in sheet.rows)
    assert "not finite, in all: 0;" in sheet.note
    assert "memory ran out: 0;" in sheet.note
    winner = folder / "profiles" / "winner.json"
    data = json.loads(winner.read_text())
    assert data["average"] <= 3.0

    export_profile(winner, tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    made = make_problem("language_model", **problem)
    held_out = made.held_out  # type: ignore[attr-defined]
    with torch.inference_mode():
        logits = exported(held_out).logits[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
    assert float(losses.exp()) == pytest.approx(data["held_out"]["perplexity"], rel=1e-4)


def test_a_range_of_bits_or_sizes_gives_a_front_of_which_a_point_is_exported(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    problem = settings(model_folder, tmp_path / "store", average={"from": 2.2, "to": 3.6})
    plan = plan_of(problem, searchers=[{"name": "uniform"}, {"name": "curvature_front", "settings": {"budgets": 3}}])
    plan.check()
    rehearse_and_prepare(problem, plan)
    folder = compare(plan, root=tmp_path / "runs")
    space = Comparison.read(folder).problems["tiny"].space
    assert space.ranged
    assert space.budget == int(3.6 * space.total_size)
    assert 2.15 * space.total_size < space.floor <= 2.2 * space.total_size
    for record in Comparison.read(folder).records():
        front = record.checkpoints[-1].front
        assert len(front) > 5
        assert all(point.held_out["loss"] > 0 for point in front)
    with pytest.raises(SystemExit, match="0"):
        main(["pick", str(folder), str(tmp_path / "p.json"), "--average", "3"])
    assert "the search found" in export_profile(tmp_path / "p.json", tmp_path / "exported")["checked"]
    levels = language_model.task(problem).open_levels().counted_in("bytes")
    file = FileSize.of(str(model_folder), levels)
    sizes = [size for _, size, _ in file.rows(levels)]
    ends = {"from": f"{sizes[0] + 900} B", "to": f"{sizes[-1]} B"}
    whole = language_model.task({**problem, "average": None, "size": ends}).space(levels)
    assert whole.ranged
    assert file.rest + whole.budget == sizes[-1]
    assert sizes[0] <= file.rest + whole.floor <= sizes[0] + 900


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average": {"from": 1.5, "to": 3}}, "outside what levels"),
        ({"average": {"from": 3, "to": 3}}, "or a range: { from = ..., to = ... }"),
        ({"average": {"from": 2.5}}, "or a range: { from = ..., to = ... }"),
        ({"average": "3 bits"}, "average='3 bits' must be"),
        ({"size": {"from": "60 MB", "to": 70}}, "must be"),
        ({"size": {"from": "60 MB", "to": "-1 MB"}}, "must be a size above 0"),
        ({"size": "60 MB"}, "leave out average and resource"),
        ({"average": 1.5}, "outside what levels"),
        ({"average": 7.0}, "outside what levels"),
        ({"model": "/nowhere"}, "/nowhere"),
        ({"fitness": "accuracy"}, "one of: kl"),
        ({"held_out_tokens": 100}, "multiples of sequence_length"),
        ({"tokens": 100}, "100"),
        ({"levels": [2, 3, 99]}, "99"),
        ({"levels": ["", 3, 4]}, "must be numbers"),
        ({"method": "ggml"}, "must be ggml types"),
        ({"dtype": "int4"}, "float32"),
        ({"method": "gguf"}, "gguf"),
        ({"method": "wanda", "levels": [], "build": {}}, "average=3.0 of wanda must be a sparsity, from 0 to 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"tensor_parallel": 0}, "tensor_parallel=0 must be at least 1"),
        ({"build": {"group_size": "16"}}, "gptq: group_size='16' must be an integer"),
        ({"build": {"symmetric": "no"}}, "gptq: symmetric='no' must be true or false"),
        ({"build": {"seed": -1}}, "seed=-1 must be 0 or more"),
        ({"calibration": ""}, "no text ''"),
        ({"held_out": ""}, "no text ''"),
        ({"join": ["nowhere"]}, "no level store at 'nowhere'"),
        ({"average": {"from": 2.5, "to": math.nan}}, "outside what levels"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    changes: dict[str, Any], message: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    problem = settings(model_folder, tmp_path / "store", **changes)
    with pytest.raises(EvoHpoError) as caught:
        rehearse_and_prepare(problem, plan_of(problem))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("split", ["calibration", "held_out"])
def test_a_text_that_is_missing_or_too_short_is_refused_before_the_store_is_built(
    model_folder: Path, tmp_path: Path, split: str
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("\n\n".join(f"paragraph {i}" for i in range(9)), encoding="utf-8")
    for text, message in ((str(short), "name a (longer )?text"), (str(tmp_path / "none.txt"), "none.txt")):
        chosen = settings(model_folder, tmp_path / "store", method="rtn", **{split: text})
        for changes, told in (({}, message), ({"sequence_length": 1}, "sequence_length=1")):
            with pytest.raises(TextError, match=told):
                prepare_problem("language_model", chosen | changes, lambda *_: None)
        assert not (tmp_path / "store").exists()


def test_without_levels_a_method_has_its_own(model_folder: Path, tmp_path: Path) -> None:
    chosen = settings(model_folder, tmp_path / "store", method="rtn", levels=[])
    assert preview_problem("language_model", chosen) is not None
    prepare_problem("language_model", chosen, lambda *_: None)
    assert set(make_problem("language_model", **chosen).space.units[0].levels) == {"2", "3", "4", "5", "6"}


def test_a_budget_that_pays_for_no_stage_is_refused(model_folder: Path, tmp_path: Path) -> None:
    problem = settings(model_folder, tmp_path / "store")
    with pytest.raises(EvoHpoError, match="does not pay"):
        rehearse_and_prepare(problem, plan_of(problem, budget={"tokens": 40}))


def test_a_warm_cache_changes_no_trial(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    changes: dict[str, Any] = {"method": "rtn", "build": {"group_size": 16}, "cache": str(tmp_path / "losses.sqlite")}
    changes |= {"early_stopping": False}
    problem = settings(model_folder, tmp_path / "store", **changes)
    plan = plan_of(problem)
    rehearse_and_prepare(problem, plan)
    cold, warm = (read_journals(compare(plan, root=tmp_path / name)) for name in ("cold", "warm"))
    assert (tmp_path / "losses.sqlite").exists()
    for a, b in zip(cold, warm, strict=True):
        assert [(o.trial, o.loss, o.tokens) for o in a.outcomes] == [(o.trial, o.loss, o.tokens) for o in b.outcomes]


@pytest.mark.parametrize(("dtype", "used"), [("auto", "bfloat16"), ("float32", "float32"), ("mixed", "mixed")])
def test_the_dtype_is_the_named_one_or_the_one_measured_fastest(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, used: str
) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(task, "fastest_dtype", lambda _: torch.bfloat16)
    problem = settings(model_folder, tmp_path / "store", method="rtn", dtype=dtype, measure=True)
    rehearse_and_prepare(problem, plan_of(problem))
    made = make_problem("language_model", **problem)
    assert made.score([made.space.uniform()], Minibatch(0, 64))[0].loss > 0
    told = made.report()
    assert told["dtype"] == used
    assert any(what.startswith("threads") for what, _ in told["measured"])


def test_a_store_of_another_model_is_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    changes = {"method": "rtn", "build": {"group_size": 16}}
    problem = settings(model_folder, tmp_path / "store", **changes)
    rehearse_and_prepare(problem, plan_of(problem))
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.save_pretrained(other)
    problem = settings(other, tmp_path / "store", **changes)
    with pytest.raises(EvoHpoError, match="another"):
        rehearse_and_prepare(problem, plan_of(problem))


def test_a_missing_model_setting_is_named() -> None:
    with pytest.raises(EvoHpoError, match="'model' is required"):
        language_model()
