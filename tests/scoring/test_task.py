"""A comparison on a (tiny, random) language model, from model folder to exported model."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evo_hpo.cli.commands import main
from evo_hpo.errors import EvoHpoError, TextError
from evo_hpo.export import folder
from evo_hpo.export.folder import export_profile
from evo_hpo.record.comparison import Comparison
from evo_hpo.record.journal import read_journals
from evo_hpo.report import Findings
from evo_hpo.report.scoring_sheet import scoring_sheet
from evo_hpo.run.plan import Plan, make_plan
from evo_hpo.run.rehearsal import rehearse
from evo_hpo.run.schedule import compare
from evo_hpo.scoring import task
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
    whole = language_model.task({**problem, "average": 3.0, "size": ends}).space(levels)
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
        ({"cache": "losses.sqlite"}, "early_stopping = false"),
        ({"method": "gguf"}, "gguf"),
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


@pytest.mark.parametrize(("dtype", "used"), [("auto", "bfloat16"), ("float32", "float32")])
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


def test_storage_bits_can_be_the_budget(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    nominal = settings(model_folder, tmp_path / "store", method="rtn")
    rehearse_and_prepare(nominal, plan_of(nominal))
    stored = make_problem("language_model", **nominal | {"resource": "storage", "average": 5.0})
    a_group = 16 + 8  # bits of its scale and zero point, beside the codes of its 16 weights
    for unit in stored.space.units:
        assert unit.costs == tuple(bits * unit.size + a_group * unit.size // 16 for bits in (2, 3, 4))
    assert stored.space.budget == 5 * stored.space.total_size
    assert stored.score([stored.space.uniform()], Minibatch(0, 32))[0].loss > 0
    with pytest.raises(EvoHpoError, match="resource='weights' must be empty or 'storage'"):
        make_problem("language_model", **nominal | {"resource": "weights"})


TIES = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


@pytest.fixture(scope="module")
def rounded(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a problem with a store of rounded levels that is built, and the folder of one of pruned levels."""
    folder = tmp_path_factory.mktemp("stores")
    chosen = settings(model_folder, folder / "rtn", method="rtn", dtype="float32", early_stopping=False)
    prepare_problem("language_model", chosen, lambda *_: None)
    pruned = chosen | {"method": "magnitude", "levels": [0.5], "average": 0.5, "store": str(folder / "magnitude")}
    prepare_problem("language_model", pruned | {"build": {}}, lambda *_: None)
    return chosen


def loss(problem: Any, levels: dict[str, str]) -> float:
    """Loss of an assignment that is given by the label of each unit's level."""
    assignment = tuple(unit.levels.index(levels[unit.name]) for unit in problem.space.units)
    return float(problem.score([assignment], Minibatch(0, 32))[0].loss)


def test_tied_modules_share_a_level(rounded: dict[str, Any]) -> None:
    tied = make_problem("language_model", **rounded | {"tie": TIES})
    free = make_problem("language_model", **rounded)
    assert [unit.name for unit in tied.space.units[:4]] == [
        "model.layers.0.self_attn.q_proj+k_proj+v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj+up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert tied.space.total_size == free.space.total_size
    labels = {unit.name: "234"[i % 3] for i, unit in enumerate(tied.space.units)}
    spread = {member: labels[unit.name] for unit in tied.space.units for member in unit.members}
    assert loss(tied, labels) == loss(free, spread)


def test_levels_of_other_stores_and_dropped_ones_are_offered_too(rounded: dict[str, Any]) -> None:
    other = str(Path(rounded["store"]).with_name("magnitude"))
    mixed = make_problem("language_model", **rounded | {"join": [other], "dropped": True})
    for unit in mixed.space.units:
        assert unit.levels == ("dropped", "2", "3", "4", "magnitude 0.5")
        assert unit.costs == tuple(bits * unit.size for bits in (0, 2, 3, 4, 8))  # 16 bits for each kept weight
    pruned = rounded | {"method": "magnitude", "levels": [0.5], "average": 0.5, "store": other, "build": {}}
    alone = make_problem("language_model", **pruned)
    names = [unit.name for unit in mixed.space.units]
    assert loss(mixed, dict.fromkeys(names, "magnitude 0.5")) == loss(alone, dict.fromkeys(names, "0.5"))
    assert loss(mixed, dict.fromkeys(names, "4") | {names[-1]: "dropped"}) > loss(mixed, dict.fromkeys(names, "4"))


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_mixed_profile_is_exported_with_the_levels_that_it_names(
    rounded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = str(Path(rounded["store"]).with_name("magnitude"))
    problem = rounded | {"join": [other], "dropped": True, "tie": TIES}
    made = make_problem("language_model", **problem)
    names = [unit.name for unit in made.space.units]
    labels = dict.fromkeys(names, "2") | {names[0]: "magnitude 0.5", names[3]: "dropped"}
    assignment = [unit.levels.index(labels[unit.name]) for unit in made.space.units]
    profile = {
        "problem": {"name": "language_model", "settings": problem},
        "held_out": made.validate(tuple(assignment)),
        "average": made.space.average(assignment),
        "levels": assignment,
        "units": labels,
    }
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_level_lines", full)
        with pytest.raises(OSError, match="No space left"):
            export_profile(tmp_path / "profile.json", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]  # nothing half written
    export_profile(tmp_path / "profile.json", tmp_path / "model")
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_modules())
    share = [
        float((exported[f"model.layers.0.self_attn.{n}_proj"].weight == 0).float().mean()) for n in ("q", "k", "v")
    ]
    assert share == [0.5, 0.5, 0.5]
    assert not exported["model.layers.0.mlp.down_proj"].weight.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie": [["q_proj"]]}, "lists of two or more, each name once"),
        ({"tie": [["q_proj", "k_proj"], ["k_proj", "v_proj"]]}, "lists of two or more, each name once"),
        ({"tie": [["query", "key"]]}, "ties nothing: the units are called q_proj, k_proj, v_proj, o_proj"),
        ({"join": ["/nowhere"]}, "/nowhere"),
        ({"method": "magnitude", "join": ["x"], "build": {}}, "counts bits: it needs gptq, ggml or rtn, or storage"),
        ({"method": "drop", "dropped": True, "levels": []}, "need a method with levels of weights, not 'drop'"),
    ],
)
def test_ties_and_joins_that_cannot_be_are_refused(rounded: dict[str, Any], changes: Any, message: str) -> None:
    with pytest.raises(EvoHpoError, match=re.escape(message)):
        make_problem("language_model", **rounded | changes)


def test_a_search_over_tied_joined_and_dropped_levels_runs(rounded: dict[str, Any], tmp_path: Path) -> None:
    other = str(Path(rounded["store"]).with_name("magnitude"))
    problem = rounded | {"join": [other], "dropped": True, "tie": TIES, "average": 2.5}
    plan = plan_of(problem, budget={"tokens": 1024})
    rehearse_and_prepare(problem, plan)
    folder = compare(plan, root=tmp_path)
    assert all(r.finished for r in read_journals(folder))
