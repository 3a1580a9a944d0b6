"""`build`: from a model's name to an open store, with every method, dtype and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evo_hpo.cli.building import build_from_cli
from evo_hpo.errors import EvoHpoError, InvalidSettingError, StoreError, UnknownNameError
from evo_hpo.levels import joined
from evo_hpo.levels.build import METHODS, build
from tests.tiny import tiny_model

TEXT: dict[str, Any] = {"calibration_tokens": 320, "sequence_length": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama and a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {"?": 0, **{chr(code): code - 31 for code in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer).save_pretrained(folder)
    made: Any = tiny_model("llama")
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds_and_a_finished_build_is_only_opened(model: str, method: str, tmp_path: Path) -> None:
    settings = {} if method == "drop" else TEXT
    store = build(model, tmp_path / "s", method=method, **settings)
    assert store.manifest.plan.method == method
    assert set(store.manifest.versions) == {"python", "torch", "transformers"}
    assert all(unit.costs == tuple(sorted(unit.costs)) for unit in store.units)
    assert all(list(errors) == sorted(errors, reverse=True) for errors in store.errors)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    assert build(model, tmp_path / "s", method=method, **settings).fingerprint == store.fingerprint
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")} == times


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_models_are_loaded_in_any_dtype(model: str, dtype: str, tmp_path: Path) -> None:
    store = build(model, tmp_path / "s", levels=[3, 8], dtype=dtype, **TEXT)
    assert store.manifest.plan.calibration["dtype"] == dtype
    reference = build(model, tmp_path / "r", levels=[3, 8], **TEXT)
    assert store.manifest.plan.identity == reference.manifest.plan.identity
    for ours, theirs in zip(store.errors, reference.errors, strict=True):
        assert ours == pytest.approx(theirs, rel=0.15)
    with pytest.raises(EvoHpoError, match="bfloat16"):
        build(model, tmp_path / "t", dtype="int3")


def test_calibration_text_can_be_a_file_or_the_model_itself(model: str, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {i} " * 30}) for i in range(40)))
    stores = [
        build(model, tmp_path / str(i), levels=[3], calibration=text, **TEXT)
        for i, text in enumerate(("pydoc", str(path), "self"))
    ]
    assert [store.manifest.plan.calibration["text"] for store in stores] == ["pydoc", str(path), "self"]
    assert len({store.fingerprint for store in stores}) == 3
    again = build(model, tmp_path / "again", levels=[3], calibration="self", **TEXT)
    assert again.fingerprint == stores[2].fingerprint


def test_two_stores_of_one_model_join_into_one_space(model: str, tmp_path: Path) -> None:
    bits = build(model, tmp_path / "bits", method="rtn", levels=[3, 4])
    sparse = build(model, tmp_path / "sparse", method="magnitude", levels=[0.5])
    space = joined([bits.levels.with_dropped(), sparse.levels]).space("3.5")
    assert space.units[0].levels == ("dropped", "3", "4", "0.5")
    stored = joined([bits.levels, sparse.levels], resource="storage")
    assert np.min(stored.units[0].costs) > 3 * stored.units[0].size  # scales and zero points count


def test_steps_cost_the_same_in_units_of_any_size(model: str, tmp_path: Path) -> None:
    store = build(model, tmp_path / "s", method="magnitude", levels=[0.5], step=50, steps=2)
    assert store.units[0].levels == ("+2", "+1", "+0", "-1", "-2")
    assert all((np.diff(unit.costs) == 50).all() for unit in store.units)
    assert len({unit.size for unit in store.units}) > 1


def test_steps_that_a_layer_has_not_the_weights_for_are_left_out_and_counted(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = build(model, tmp_path / "s", method="magnitude", levels=[0.5], step=200, steps=3)
    for unit in store.units:
        fitting = min(3, unit.size // 2 // 200)  # half of the weights are there to remove, or to give back
        assert unit.costs == tuple(unit.size // 2 + 200 * n for n in range(-fitting, fitting + 1))
    assert {unit.size: len(unit.levels) for unit in store.units} == {1024: 5, 512: 3, 1536: 7}
    assert "6 of 21 layers have other levels: 512 weights are too few for the steps of +3, +2, -2, -3" in caplog.text
    assert "6 of 21 layers have other levels: 1024 weights are too few for the steps of +3, -3 (such as" in caplog.text
    assert "1536" not in caplog.text


@pytest.mark.parametrize(
    ("method", "levels", "inputs"),
    [("gptq", [2, 3, 4], "3"), ("gptq", [2, 4], "2"), ("gptq", [6, 5], "5"), ("wanda", [0.5], "dense")],
)
def test_calibration_is_on_the_level_nearest_three_bits(
    model: str, method: str, levels: list[float], inputs: str, tmp_path: Path
) -> None:
    assert build(model, tmp_path, method=method, levels=levels, **TEXT).manifest.plan.calibration["inputs"] == inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "gptq, ggml, sparsegpt"),
        ({"groups": 3}, "group_size"),
        ({"levels": [2.5]}, "whole number"),
        ({"levels": [3], "inputs": "4"}, "'dense' or one of 3"),
        ({"method": "drop", "kinds": "head"}, "attention"),
        ({"levels": [3], "device": "abacus"}, "abacus.*cpu"),
        ({"symmetric": "False"}, "gptq: symmetric='False' must be true or false"),
        ({"group_size": "16"}, "group_size='16' must be an integer"),
        ({"group_size": True}, "group_size=True must be an integer"),
        ({"group_size": 1e9}, r"group_size=1000000000\.0 must be an integer"),
        ({"group_size": 10**20}, "must be 1 to 1048576"),
        ({"method": "wanda", "values": 16}, "values=16 must be text"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
        ({"seed": 1e3}, r"seed=1000\.0 must be an integer"),
        ({"calibration_tokens": "many"}, "calibration_tokens='many' must be an integer"),
        ({"calibration_tokens": -5}, "calibration_tokens=-5 must be 1 or more"),
        ({"sequence_length": 1}, "sequence_length=1 must be 2 or more"),
        ({"batch_tokens": -7}, "batch_tokens=-7 must be 1 or more"),
        ({"damping": float("nan")}, "damping=nan must be a number above 0"),
        ({"method": "magnitude", "levels": ["1/0"]}, "sparsity '1/0' must be a number from 0 to 1"),
        ({"method": "magnitude", "levels": [0.5], "step": 9, "inputs": "+1"}, r"'dense' or one of \+0$"),
        ({"method": "drop", "kinds": ["mlp", "mlp"]}, r"kinds=\['mlp', 'mlp'\] must be .* each once"),
        ({"include": "("}, r"include='\(' is no regular expression"),
        ({"method": "drop", "may_drop": "("}, r"may_drop='\(' is no regular expression"),
        ({"method": "drop", "kinds": 3}, "kinds=3 must be text or a list"),
    ],
)
def test_what_cannot_be_built_is_refused(model: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((InvalidSettingError, UnknownNameError), match=message):
        build(model, tmp_path, **{**TEXT, **settings} if settings.get("method") != "drop" else settings)


def test_settings_are_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingError, match="symmetric='no'"):
        build("nowhere", tmp_path, symmetric="no")
    with pytest.raises(InvalidSettingError, match="device='abacus' cannot be used"):
        build("nowhere", tmp_path, device="cpu,abacus")


def test_a_level_to_calibrate_on_may_be_given_as_the_number_that_it_is(model: str, tmp_path: Path) -> None:
    plans = [build(model, tmp_path / str(i), levels=[3], inputs=i, **TEXT).manifest.plan for i in (3, "3")]
    assert plans[0] == plans[1]


def test_a_damaged_record_of_a_begun_build_is_told(model: str, tmp_path: Path) -> None:
    for data in (b"{", b"\xff", b"[]", b"{}"):
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / "build.json").write_bytes(data)
        with pytest.raises(StoreError, match="damaged file .*build.json.*delete the folder"):
            build(model, tmp_path / "s", method="rtn")


def test_the_command_line_says_what_a_store_holds(model: str, tmp_path: Path) -> None:
    console = Console(record=True, width=400)
    settings = {**TEXT, "group_size": 16, "dtype": "bfloat16", "device": "cpu"}
    build_from_cli(console, model=model, output=tmp_path / "s", levels="3,4", settings=settings)
    shown = console.export_text()
    assert "21 units" in shown
    assert "4.000" in shown
    assert "5.500" in shown  # 4 bits, and a half-precision scale and an 8-bit zero point for each 16 weights
    assert torch.get_default_dtype() == torch.float32


def test_the_place_of_the_work_is_no_part_of_a_stores_name(model: str, tmp_path: Path) -> None:
    console = Console(record=True, width=400)
    for settings in ({}, {"device": "cpu:0", "dtype": "float32"}):
        build_from_cli(console, model=model, method="rtn", levels="3", settings=settings)
    assert len(list((tmp_path / "cache" / "stores").iterdir())) == 1
    build_from_cli(console, model=model, method="rtn", levels="3", settings={"dtype": "bfloat16"})
    assert len(list((tmp_path / "cache" / "stores").iterdir())) == 2
