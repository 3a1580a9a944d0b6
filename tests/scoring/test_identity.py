"""What is used is what was searched: profiles, stores and cached losses of another model, text or store are refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evo_hpo.errors import EvoHpoError, PlanError
from evo_hpo.export.folder import export_profile
from evo_hpo.levels.build import build
from evo_hpo.record.comparison import Comparison
from evo_hpo.run import schedule
from evo_hpo.run.plan import Plan
from evo_hpo.run.schedule import compare
from evo_hpo.scoring import task
from evo_hpo.scoring.score_cache import ScoreCache
from evo_hpo.scoring.task import LanguageModelTask, language_model
from evo_hpo.scoring.tuning import fastest_dtype
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.registry import make_problem, settled
from tests.scoring.test_task import model_folder, plan_of, rehearse_and_prepare, settings

__all__ = ["model_folder"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(model_folder, tmp_path / "model")


def text(path: Path, word: str) -> Path:
    path.write_text("\n".join(json.dumps({"text": f"{word} {i} sat on the mat " * 30}) for i in range(60)))
    return path


def change_weights(folder: Path) -> None:
    changed: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    changed.save_pretrained(folder)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    words = data["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(data))


def searched(model: Path, folder: Path, **changes: Any) -> tuple[Plan, Path]:
    """A plan, and the folder of its comparison, with a store beside it."""
    problem = settings(model, folder / "store", method="rtn", **changes)
    plan = plan_of(problem, searchers=[{"name": "uniform"}])
    rehearse_and_prepare(problem, plan)
    return plan, compare(plan, root=folder / "runs")


def found_profile(model: Path, tmp_path: Path, **changes: Any) -> Path:
    return searched(model, tmp_path, **changes)[1] / "profiles" / "winner.json"


@pytest.fixture(scope="module")
def searched_once(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a store and a comparison that read no cache and are copied, never changed."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVO_HPO_CACHE", str(folder / "cache"))
        searched(shutil.copytree(model_folder, folder / "model"), folder)
    return folder


@pytest.fixture
def comparison(searched_once: Path, tmp_path: Path, cache: Path) -> Path:
    """The comparison's folder in a copy of all that belongs to it; every path in it names the copy."""
    shutil.copytree(searched_once, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "runs").rglob("*"):
        if path.is_file() and (text := path.read_bytes()).count(before := bytes(searched_once)):
            path.write_bytes(text.replace(before, bytes(tmp_path)))
    return tmp_path / "runs" / "tiny"


@pytest.fixture
def profile(comparison: Path) -> Path:
    return comparison / "profiles" / "winner.json"


def plan_here(tmp_path: Path) -> Plan:
    """The plan of the copied comparison."""
    return plan_of(settings(tmp_path / "model", tmp_path / "store", method="rtn"), searchers=[{"name": "uniform"}])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_weights, "model weights"),
        (lambda folder: change_config(folder, hidden_act="gelu"), "model configuration"),
        (change_tokenizer, "tokenizer"),
    ],
)
def test_a_profile_is_refused_where_the_model_is_another(
    profile: Path, tmp_path: Path, change: Any, named: str
) -> None:
    change(tmp_path / "model")
    with pytest.raises(PlanError, match=f"winner.json was found with another {named}") as caught:
        export_profile(profile, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_profile_is_refused_where_the_store_was_built_again_otherwise(profile: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.rmtree(tmp_path / "store")
    build(str(model), tmp_path / "store", method="rtn", levels=[2, 3, 4], group_size=16, symmetric=True)
    with pytest.raises(PlanError, match="another store"):
        export_profile(profile, tmp_path / "out")
    shutil.rmtree(tmp_path / "store")
    build(str(model), tmp_path / "store", method="rtn", levels=[2, 3, 4], group_size=16)
    assert export_profile(profile, tmp_path / "out")["search"] == "uniform-s0"


def test_a_profile_of_an_earlier_version_is_taken_with_a_warning(
    profile: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = json.loads(profile.read_text())
    del data["fingerprint"]["identity"]
    profile.write_text(json.dumps(data))
    with caplog.at_level(logging.WARNING):
        export_profile(profile, tmp_path / "out")
    assert [r.getMessage().split(" was written")[0] for r in caplog.records] == [f"the profile {profile}"]


def test_a_store_of_an_earlier_version_is_taken_with_a_warning(
    model: Path, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen: dict[str, Any] = {"method": "gptq", "calibration_tokens": 320, "sequence_length": 16, "levels": [2, 3]}
    before = build(str(model), tmp_path / "store", **chosen)
    for name in ("build.json", "manifest.json"):
        data = json.loads((tmp_path / "store" / name).read_text())
        plan = data.get("plan", data)
        plan["model_fingerprint"] = "0" * 16
        del plan["identity"], plan["calibration"]["tokens"]
        (tmp_path / "store" / name).write_text(json.dumps(data))
    with caplog.at_level(logging.WARNING):
        assert build(str(model), tmp_path / "store", **chosen).fingerprint == before.fingerprint
    assert "earlier version" in caplog.records[0].getMessage()
    with pytest.raises(EvoHpoError, match="calibration inputs, settings"):
        build(str(model), tmp_path / "store", **chosen | {"levels": [2, 4]})


@pytest.mark.parametrize("change", [change_weights, lambda folder: change_config(folder, rms_norm_eps=1e-3)])
def test_a_cached_loss_is_of_this_model_and_no_other(model: Path, tmp_path: Path, cache: Path, change: Any) -> None:
    def loss(where: str) -> float:
        problem = settings(
            model, tmp_path / "none", method="rtn", early_stopping=False, cache=str(tmp_path / f"{where}.sqlite")
        ) | {"store": ""}
        rehearse_and_prepare(problem, plan_of(problem))
        made = make_problem("language_model", **problem)
        return float(made.score([made.space.uniform()], Minibatch(0, 64))[0].loss)

    before = loss("shared")
    assert loss("shared") == before
    change(model)
    changed = loss("shared")
    assert changed == pytest.approx(loss("fresh"), rel=1e-4)
    assert changed != pytest.approx(before, rel=1e-2)


def test_a_default_store_is_named_after_content(model: Path, tmp_path: Path, cache: Path) -> None:
    one, other = text(tmp_path / "one.jsonl", "cat"), text(tmp_path / "two.jsonl", "dog")

    def folder(**changes: Any) -> Path:
        return LanguageModelTask(str(model), **changes).store_folder

    before = folder(calibration=str(one))
    assert folder(calibration=str(other)) != before
    shutil.copy(one, tmp_path / "copy.jsonl")
    assert folder(calibration=str(tmp_path / "copy.jsonl")) == before
    text(one, "cow")
    assert folder(calibration=str(one)) != before
    before = folder()
    assert folder(build={"group_size": 64, "batch_tokens": 512}) == before  # a default, and what changes nothing
    assert folder(build={"seed": 1}) != before
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(model, moved)
    assert LanguageModelTask(str(moved)).store_folder == before
    change_weights(moved)
    assert LanguageModelTask(str(moved)).store_folder != before
    assert len(LanguageModelTask(str(model), build={"include": "x" * 300}).store_folder.name) < 130


def test_a_store_is_the_same_under_another_name_of_model_and_text(
    model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = text(tmp_path / "x.jsonl", "cat")
    chosen: dict[str, Any] = {"levels": [2, 3], "calibration_tokens": 320, "sequence_length": 16}
    before = build(str(model), tmp_path / "store", calibration=str(path), **chosen)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, same in (("~/model", "~/x.jsonl"), ("model", "x.jsonl")):
        assert build(name, tmp_path / "store", calibration=same, **chosen).fingerprint == before.fingerprint
    text(path, "dog")
    with pytest.raises(EvoHpoError, match="other calibration text"):
        build(str(model), tmp_path / "store", calibration=str(path), **chosen)


def test_a_problem_says_what_it_is_of(model: Path, tmp_path: Path, cache: Path) -> None:
    problem = settings(model, tmp_path / "store", method="rtn", dtype="float32")
    rehearse_and_prepare(problem, plan_of(problem))
    found = language_model(**problem).fingerprint()["identity"]
    words = {"model weights", "model configuration", "tokenizer", "store", "calibration text", "held-out text", "dtype"}
    assert found.keys() == words
    assert found["dtype"] == "float32"
    changed = language_model(**problem | {"seed": 1}).fingerprint()["identity"]
    assert {key for key in words if found[key] != changed[key]} == {"calibration text", "held-out text"}


def test_profiles_carry_the_identity(profile: Path) -> None:
    assert json.loads(profile.read_text())["fingerprint"]["identity"]["store"]
    assert profile in Comparison.read(profile.parent.parent).winner_files()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_export_has_the_dtype_of_the_model_unless_asked(
    model: Path, tmp_path: Path, cache: Path, dtype: str
) -> None:
    changed: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    changed.save_pretrained(model)
    profile = found_profile(model, tmp_path, dtype="float32")
    size = (model / "model.safetensors").stat().st_size
    for asked, expected in (("", dtype), ("float16", "float16")):
        export_profile(profile, tmp_path / f"out{asked}", asked)
        saved = load_file(tmp_path / f"out{asked}" / "model.safetensors")
        assert {str(tensor.dtype) for tensor in saved.values()} == {f"torch.{expected}"}
        config = json.loads((tmp_path / f"out{asked}" / "config.json").read_text())
        assert config["dtype"] == expected
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == pytest.approx(size, rel=0.01)


def test_a_profile_found_with_mixed_arithmetic_is_exported(model: Path, tmp_path: Path, cache: Path) -> None:
    profile = found_profile(model, tmp_path, dtype="mixed")
    assert json.loads(profile.read_text())["fingerprint"]["identity"]["dtype"] == "mixed"
    assert "the search found" in export_profile(profile, tmp_path / "out")["checked"]


def test_a_profile_counted_in_storage_is_exported(model: Path, tmp_path: Path, cache: Path) -> None:
    profile = found_profile(model, tmp_path, resource="storage", average=5.0)
    data = export_profile(profile, tmp_path / "out")
    assert data["average"] <= 5.0
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_dtype_is_measured_once_a_comparison_and_used_by_all_workers(
    model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it is measured otherwise than any worker would, and before the resume otherwise than here."""
    here = fastest_dtype("cpu")
    other = torch.float32 if here == torch.bfloat16 else torch.bfloat16
    problem = settings(model, tmp_path / "store", method="rtn", dtype="auto")
    plan = plan_of(problem, searchers=[{"name": "uniform"}])
    rehearse_and_prepare(problem, plan)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    chosen = {"tiny": {"dtype": str(other).removeprefix("torch.")}}
    for measured in (other, here):
        monkeypatch.setattr(task, "fastest_dtype", lambda _, measured=measured: measured)
        begun = schedule._settled(Comparison.start(tmp_path / "runs" / "tiny", plan.plain(), []), plan)
        assert begun.choices == Comparison.read(begun.folder).choices == chosen
    journal = compare(plan, root=tmp_path / "runs", resume=True) / "journals" / "uniform-s0.jsonl"
    header = json.loads(journal.read_text().splitlines()[0])
    assert {"dtype": header["fingerprint"]["identity"]["dtype"]} == chosen["tiny"]


def test_a_resume_uses_the_dtype_that_was_recorded(model: Path, tmp_path: Path) -> None:
    asked = settings(model, tmp_path / "store", method="rtn", dtype="auto")
    for recorded in ("float32", "bfloat16", "float16"):  # also where no choice was written, by an earlier version
        assert settled("language_model", asked, {"identity": {"dtype": recorded}}) == {"dtype": recorded}
    assert settled("language_model", asked | {"dtype": "float32"}, {"identity": {"dtype": "bfloat16"}}) == {}
    assert settled("language_model", asked, {})["dtype"] in ("float32", "bfloat16")


def test_what_differs_at_a_resume_is_said_in_words(comparison: Path, tmp_path: Path) -> None:
    plan = plan_here(tmp_path)
    assert compare(plan, root=tmp_path / "runs", resume=True) == comparison
    change_tokenizer(tmp_path / "model")
    with pytest.raises(EvoHpoError, match=r"identity\.tokenizer: was '\w+', is '\w+'"):
        compare(plan, root=tmp_path / "runs", resume=True)


def test_a_comparison_of_an_earlier_version_is_resumed_with_a_warning(
    comparison: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, plan = comparison, plan_here(tmp_path)

    def older(data: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in data["fingerprint"].items() if k in ("problem", "space")}
        return data | {"fingerprint": kept | {"evaluator": "0" * 32, "held_out": "0" * 16}}

    data = json.loads((folder / "comparison.json").read_text())
    data["problems"] = {key: older(value) for key, value in data["problems"].items()}
    (folder / "comparison.json").write_text(json.dumps(data))
    journal = next((folder / "journals").iterdir())
    header, *lines = journal.read_text().splitlines()
    journal.write_text("\n".join([json.dumps(older(json.loads(header))), *lines, ""]))
    compare(plan, root=tmp_path / "runs", resume=True)
    assert "earlier version" in caplog.records[0].getMessage()


def test_a_file_in_the_way_of_a_folder_is_told_in_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = tmp_path / "file"
    way.write_text("")
    monkeypatch.setenv("EVO_HPO_CACHE", str(way))
    text_of_its_own: dict[str, Any] = {"calibration_tokens": 320, "sequence_length": 16}
    tries: list[Any] = [
        lambda: build(str(model), tmp_path / "store", method="gptq", **text_of_its_own),
        lambda: build(str(model), way, method="rtn"),
        lambda: build(str(model), way / "below", method="rtn"),
        lambda: ScoreCache(way / "losses.sqlite", "x"),
        lambda: ScoreCache(tmp_path, "x"),
        lambda: export_profile(tmp_path / "profile.json", way / "out"),
    ]
    for attempt in tries:
        with pytest.raises(EvoHpoError, match=r"cannot (make the folder|be used)") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    way.write_text("no database " * 100)
    with pytest.raises(EvoHpoError, match="cannot be used"):
        ScoreCache(way, "x")
