"""Levels that a task offers beyond its store's own: storage as the budget, tied units, joined stores, dropped ones."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from evo_hpo.cli.commands import app
from evo_hpo.errors import EvoHpoError, StoreError
from evo_hpo.export import folder
from evo_hpo.export.folder import export_profile
from evo_hpo.record.journal import read_journals
from evo_hpo.run.plan_file import PlanFile
from evo_hpo.run.schedule import compare
from evo_hpo.scoring.expected_levels import expected_levels
from evo_hpo.scoring.task import language_model
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.registry import make_problem, prepare_problem, preview_problem
from tests.scoring.test_task import model_folder, plan_of, rehearse_and_prepare, settings

__all__ = ["model_folder"]


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
        ({"join": [""]}, "must name a method of levels of weights"),
        ({"join": [{"levels": [0.5]}]}, "must name a method of levels of weights"),
        ({"join": [{"method": "drop"}]}, "for dropped ones set dropped = true, and tie for whole modules"),
        ({"join": [{"method": "magnitude", "level": [0.5]}]}, "no setting 'level' (did you mean 'levels'?)"),
        ({"join": [{"method": "magnitude", "levels": 0.5}]}, "join: levels=0.5 must be a list"),
        ({"join": [{"method": "magnitude", "levels": ["half"]}]}, "levels=['half'] must be numbers"),
        ({"method": "magnitude", "join": ["x"], "build": {}}, "counts bits: it needs gptq, ggml or rtn, or storage"),
        ({"method": "drop", "dropped": True, "levels": []}, "need a method with levels of weights, not 'drop'"),
    ],
)
def test_ties_and_joins_that_cannot_be_are_refused(rounded: dict[str, Any], changes: Any, message: str) -> None:
    with pytest.raises(EvoHpoError, match=re.escape(message)):
        make_problem("language_model", **rounded | changes)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"method": "magnitud"}, "no compression method 'magnitud'"),
        ({"method": "magnitude", "levels": [1.5]}, "sparsity 1.5 must be a number from 0 to 1"),
        ({"method": "magnitude", "build": {"group_size": 16}}, "magnitude has no setting 'group_size'"),
        ({"method": "sparsegpt", "build": {"calibration": {"pydoc": -1}}}, "with shares above 0"),
    ],
)
def test_a_recipe_that_cannot_be_built_is_refused_before_any_work(
    rounded: dict[str, Any], recipe: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvoHpoError, match=re.escape(message)):
        preview_problem("language_model", rounded | {"join": [recipe], "store": "nowhere"})


def test_a_joined_recipe_is_built_where_it_is_missing_and_offers_what_its_folder_would(
    rounded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("evo_hpo.scoring.forecast.scoring_rate", lambda *_: 4.0)
    recipe = {"method": "magnitude", "levels": [0.5], "build": {}}
    written = rounded | {"join": [recipe], "dropped": True, "tie": TIES, "store": "", "resource": "storage"}
    plan = {
        "name": "p",
        "seeds": [0],
        "workers": 1,
        "budget": {"tokens": 2048},
        "searchers": [{"name": "curvature_front"}],
    }
    data = plan | {"problems": [{"name": "language_model", "settings": written | {"average": {"from": 4, "to": 7}}}]}
    (path := tmp_path / "plan.toml").write_text(tomlkit.dumps(data))
    plan_read = PlanFile.read(path).plan()
    problem = dict(plan_read.problems[0].settings)
    expected = expected_levels(language_model.task(problem)).units
    for command in (["compare", str(path), "--dry-run"], ["sizes", str(path)]):
        assert CliRunner().invoke(app, command).exit_code == 0
    assert not (tmp_path / "cache" / "stores").exists()  # texts were read, and are kept; nothing was built
    with pytest.raises(StoreError, match="no level store at"):
        make_problem("language_model", **problem)

    rehearse_and_prepare(problem, plan_read)
    assert len(list((tmp_path / "cache" / "stores").iterdir())) == 2
    made = make_problem("language_model", **problem)
    assert tuple(expected) == tuple(made.space.units)
    other = str(Path(rounded["store"]).with_name("magnitude"))
    known = make_problem("language_model", **problem | {"join": [other], "store": rounded["store"]})
    assert made.fingerprint() == known.fingerprint()
    for levels in (made.space.uniform(), made.space.lowest, (4,) * len(made.space.units)):
        assert made.score([levels], Minibatch(0, 32)) == known.score([levels], Minibatch(0, 32))

    profile = compare(plan_read, root=tmp_path / "runs") / "profiles" / "winner.json"
    shutil.rmtree(tmp_path / "runs" / "p" / "fronts")  # a profile tells all that an export needs
    assert "the search found" in export_profile(profile, tmp_path / "model")["checked"]


def test_text_that_a_joined_store_is_calibrated_on_is_not_held_out(rounded: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("\n\n".join(f"paragraph {i} of one's own, {i * i} words long" for i in range(400)))
    recipe = {"method": "wanda", "levels": [0.5], "build": {"calibration": f"whole:{text}", "calibration_tokens": 96}}
    read = language_model.task(rounded | {"join": [recipe]}).texts
    assert read.built_on == {"pydoc": 1, f"whole:{text}": 1}
    assert read.built_on_tokens == 96


def test_a_search_over_tied_joined_and_dropped_levels_runs(rounded: dict[str, Any], tmp_path: Path) -> None:
    other = str(Path(rounded["store"]).with_name("magnitude"))
    problem = rounded | {"join": [other], "dropped": True, "tie": TIES, "average": 2.5}
    plan = plan_of(problem, budget={"tokens": 1024})
    rehearse_and_prepare(problem, plan)
    folder = compare(plan, root=tmp_path)
    assert all(r.finished for r in read_journals(folder))
