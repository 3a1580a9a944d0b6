"""Packed weights: as the package packs them, loaded by transformers, equal to the evaluator's model, refused where they
cannot be served; files as large as was asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

from evo_hpo.errors import InfeasibleError, InvalidSettingError, ModelError, PlanError
from evo_hpo.export.folder import export_profile, place
from evo_hpo.export.packed_folder import pack_words
from evo_hpo.export.reading import load_served
from evo_hpo.levels.level_set import Choice, LevelSet
from evo_hpo.levels.manifest import LevelRecord, UnitRecord
from evo_hpo.levels.serving import SERVERS, check_levels
from evo_hpo.models.loading import load_model
from evo_hpo.scoring.file_size import FileSize
from evo_hpo.scoring.task import language_model
from evo_hpo.search.registry import make_problem, prepare_problem
from evo_hpo.space.amounts import Amount
from tests.tiny import save_tiny


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVO_HPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), spread=0.2)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = MixtralConfig(
        vocab_size=280,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        max_position_embeddings=64,
    )
    return save_tiny(tmp_path_factory.mktemp("mixtral"), config, spread=0.2)


def settings(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "method": "rtn",
        "build": {"group_size": 16},
        "levels": [2, 3, 4, 5, 6, 7, 8],
        **({} if "size" in changes else {"average": 5.0}),
        "sequence_length": 16,
        "calibration_tokens": 64,
        "held_out_tokens": 128,
        "dtype": "float32",
        "tokens": 64,
    } | changes


def found(folder: Path, problem: dict[str, Any], assignment: Any = None) -> tuple[Path, tuple[int, ...]]:
    """The profile of an assignment (by default levels in turns), as a comparison writes it."""
    prepare_problem("language_model", problem, lambda *_: None)
    made: Any = make_problem("language_model", **problem)
    units = made.space.units
    levels = tuple(i % len(u.levels) for i, u in enumerate(units)) if assignment is None else assignment(units)
    profile = {
        "search": "hand-s0",
        "searcher": "hand",
        "problem": {"name": "language_model", "settings": problem},
        "fingerprint": made.fingerprint(),
        "held_out": made.validate(levels),
        "average": made.space.average(levels),
        "levels": list(levels),
        "units": made.space.labels(levels),
    }
    made.evaluator.close()
    (folder / "profile.json").write_text(json.dumps(profile))
    return folder / "profile.json", levels


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(48).view(3, 16)).logits
    return result


def placed(problem: dict[str, Any], assignment: tuple[int, ...]) -> Any:
    """The model that the evaluator scores."""
    task = language_model.task(problem)
    loaded = load_model(task.model)
    place(loaded.model, task.open_levels(), assignment)
    return loaded.model


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_packed_as_the_package_packs_them(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 37), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(signed, bits))
    zeros = pack_words(codes.T.contiguous(), bits).T
    assert torch.equal(zeros, pack_to_int32(signed, bits, packed_dim=0))


@pytest.mark.parametrize("group_size", [16, 0])
def test_two_to_eight_bits_mixed_are_loaded_by_transformers_and_compute_the_same(
    model: Path, tmp_path: Path, group_size: int
) -> None:
    problem = settings(model, serve="transformers", build={"group_size": group_size})
    profile, assignment = found(tmp_path, problem)
    assert len(set(assignment)) == 7
    data = export_profile(profile, tmp_path / "out", "float32", "compressed-tensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(again), logits(placed(problem, assignment)), rtol=0, atol=1e-5)
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"].values()
    assert {g["weights"]["num_bits"] for g in groups} == {2, 3, 4, 5, 6, 7, 8}
    assert sum(len(g["targets"]) for g in groups) == 14
    assert "KL" in data["checked"]
    card = (tmp_path / "out/README.md").read_text()
    assert "| 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |" in card  # the second block's layers
    assert f"{data['held_out']['loss']:.5g}" in card


def test_what_was_found_with_products_in_bfloat16_is_loaded_back_packed(model: Path, tmp_path: Path) -> None:
    profile, _ = found(tmp_path, settings(model, serve="transformers", dtype="mixed"))
    data = export_profile(profile, tmp_path / "out", format="compressed-tensors")
    assert "the search found" in data["checked"]
    assert "held-out figures in float32 with products in bfloat16" in (tmp_path / "out/README.md").read_text()


def test_zero_points_at_four_and_eight_bits_are_for_vllm_alone(model: Path, tmp_path: Path) -> None:
    build = {"group_size": 16, "symmetric": False}
    problem = settings(model, serve="vllm", build=build, levels=[4, 8])
    profile, assignment = found(tmp_path, problem)
    export_profile(profile, tmp_path / "out", "float32", "compressed-tensors")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1, "one may read all or nothing"
    assert any(name.endswith("weight_zero_point") for name in tensors)
    again = load_served(str(tmp_path / "out")).model  # through the package's own unpacking
    assert torch.allclose(logits(again), logits(placed(problem, assignment)), rtol=0, atol=1e-5)
    for server, levels, where in (("transformers", [4, 8], "at no bits"), ("vllm", [3, 4], "only at 4 and 8 bits")):
        with pytest.raises(InvalidSettingError, match=f"{server}.*{where}"):
            language_model.preview(settings(model, serve=server, build=build, levels=levels))


def test_what_vllm_fuses_shares_a_level_and_experts_of_a_block_do(model: Path, mixtral: Path, tmp_path: Path) -> None:
    problem = settings(model, serve="vllm")
    prepare_problem("language_model", problem, lambda *_: None)
    units = language_model.task(problem).open_levels().units
    assert [u.name.rpartition(".")[2] for u in units] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] * 2
    problem = settings(mixtral, serve="vllm", levels=[3, 4, 8])
    profile, assignment = found(tmp_path, problem)
    units = language_model.task(problem).open_levels().units
    assert [len(u.members) for u in units if "experts" in u.name] == [9, 9]
    export_profile(profile, tmp_path / "out", "float32", "compressed-tensors")
    names = load_file(tmp_path / "out/model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight_packed" in names  # as checkpoints call it
    assert torch.allclose(
        logits(load_served(str(tmp_path / "out")).model), logits(placed(problem, assignment)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "k_proj at level 3.* as one matrix"),
        ({"build": {"group_size": 16, "symmetric": False}, "serve": ""}, "zero points"),
        ({"build": {"group_size": 24, "symmetric": True}}, "32 inputs are not a multiple of the group size 24"),
        ({"levels": [1, 4]}, "1 bits are outside 2 to 8"),
    ],
)
def test_a_profile_that_cannot_be_served_is_refused_with_the_reason(
    model: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    problem = {"build": {"group_size": 16, "symmetric": True}, "levels": [2, 3, 4], "average": 3.0}
    profile, _ = found(tmp_path, settings(model, **problem | changes))
    data = json.loads(profile.read_text())
    data["problem"]["settings"]["serve"] = ""
    profile.write_text(json.dumps(data))
    if not changes:  # transformers loads it, vLLM does not
        export_profile(profile, tmp_path / "fine", "float32", "compressed-tensors", check=False)
        levels = language_model.task(data["problem"]["settings"]).open_levels()
        assert reason.partition(".")[0] in SERVERS["vllm"].refusal(levels.chosen(data["levels"]))
        return
    with pytest.raises(PlanError, match=reason):
        export_profile(profile, tmp_path / "out", "float32", "compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_columns_divided_over_devices_hold_whole_groups(model: Path) -> None:
    problem = settings(model, serve="vllm", tensor_parallel=4)
    prepare_problem("language_model", problem, lambda *_: None)
    with pytest.raises(InvalidSettingError, match=r"o_proj.*32 inputs divided by 4 are not a multiple"):
        language_model.task(problem).open_levels()


def test_a_file_is_of_the_size_that_was_asked_for(model: Path, tmp_path: Path) -> None:
    problem = settings(model, serve="transformers", size="0.056 MB")
    profile, assignment = found(tmp_path, problem, lambda units: [1] * len(units))
    task = language_model.task(problem)
    levels = task.open_levels()
    space = task.space(levels)
    best = space.uniform()
    size = FileSize.of(str(model), levels)
    assert size.rest + space.budget == 56_000
    assert size.weights == sum(p.numel() for p in load_model(str(model)).model.parameters())
    for name, predicted, taken in size.rows(levels):
        assert name != "lowest" or predicted == size.rest + space.cost(space.lowest)
        assert size.rest < predicted == size.rest + space.cost(taken)
    export_profile(profile, tmp_path / "out", format="compressed-tensors", check=False)
    written = (tmp_path / "out/model.safetensors").stat().st_size
    predicted = size.rest + space.cost(assignment)
    assert predicted - 14 * 3 * 60 < written <= predicted  # the header is counted from above
    assert space.cost(best) <= space.budget
    with pytest.raises(InfeasibleError, match=r"size='1 MB' .* the file takes 0\.05\d+ MB to 0\.06\d+ MB"):
        language_model.task(settings(model, serve="transformers", size="1 MB")).space(levels)
    total = language_model.task(settings(model, serve="transformers", size="12 bits a weight")).space(levels).budget
    assert total == int(12 * size.weights / 8) - size.rest


def test_layers_that_are_copies_of_each_other_are_all_packed(tmp_path: Path) -> None:
    """As in models of repeated blocks: their levels are equal to the bit."""
    folder = save_tiny(tmp_path / "model", spread=0.2)
    repeated: Any = AutoModelForCausalLM.from_pretrained(folder)
    repeated.model.layers[1].load_state_dict(repeated.model.layers[0].state_dict())
    repeated.save_pretrained(folder)
    problem = settings(folder, serve="vllm")
    profile, assignment = found(tmp_path, problem, lambda units: [2] * len(units))
    export_profile(profile, tmp_path / "out", "float32", "compressed-tensors")
    assert sum(name.endswith("weight_packed") for name in load_file(tmp_path / "out/model.safetensors")) == 14
    again = load_served(str(tmp_path / "out")).model
    assert torch.allclose(logits(again), logits(placed(problem, assignment)), rtol=0, atol=1e-5)


def test_scales_that_half_precision_does_not_hold_are_refused_by_name(tmp_path: Path) -> None:
    """The store has an exponent for a whole layer, the format has none."""
    folder = save_tiny(tmp_path / "model", spread=0.2)
    small: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        small.model.layers[1].mlp.up_proj.weight.mul_(1e-5)
    small.save_pretrained(folder)
    problem = settings(folder, serve="transformers", levels=[4, 8])
    profile, assignment = found(tmp_path, problem)
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj' has scales of .* half precision .* --dtype float32"):
        export_profile(profile, tmp_path / "out", format="compressed-tensors", check=False)
    assert not (tmp_path / "out").exists()
    export_profile(profile, tmp_path / "out", "float32", "compressed-tensors")
    again, name = load_served(str(tmp_path / "out")).model, "model.layers.1.mlp.up_proj"
    written, wanted = again.get_submodule(name).weight, placed(problem, assignment).get_submodule(name).weight
    assert torch.allclose(written, wanted, rtol=1e-5, atol=0)  # type: ignore[arg-type]


def test_llama_cpp_is_offered_ggml_types_and_one_type_for_all_experts_of_a_projection() -> None:
    shape = UnitRecord("", (), (48, 32), 1536, False, ())
    levels = {kind: LevelRecord(kind, 1, 1, 1, 1, 0.0, {"kind": kind, "type": "Q4_0"}) for kind in ("ggml", "sparse")}
    names = [f"model.layers.0.mlp.experts.{i}.{part}_proj" for i in range(2) for part in ("up", "down")]
    of = {name: replace(shape, name=name, members=(name,)) for name in names}
    nobody: Any = None
    rows = [(name, [[Choice(nobody, unit, level)] for level in levels.values()]) for name, unit in of.items()]
    found = SERVERS["llama.cpp"].served(LevelSet(rows, "bits"))
    assert [u.name.removeprefix("model.layers.0.mlp.") for u in found.units] == ["experts.up_proj", "experts.down_proj"]
    assert {u.levels for u in found.units} == {("ggml",)}
    assert "does not run ggml" in SERVERS["vllm"].refusal(found.chosen((0, 0)))
    with pytest.raises(InvalidSettingError, match="ggml types: set method"):
        check_levels(SERVERS["llama.cpp"], "gptq", [3], True)


@pytest.mark.parametrize("text", ["400", "0 MB", "-1 GB", "3 bits", "400 MB a weight", "", "1" * 500 + " b"])
def test_a_size_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(InvalidSettingError, match="must be a size above 0"):
        Amount.of(text)
    assert Amount.of("1.5 KiB").total(7) == 1536
    assert Amount.of("0.5 bytes a weight").total(7) == 3
