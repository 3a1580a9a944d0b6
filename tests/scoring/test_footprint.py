"""Memory from a configuration, against sizes that are published and what tensors really take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3NextConfig,
)
from typer.testing import CliRunner

from evo_hpo.cli.commands import app
from evo_hpo.errors import InvalidSettingError, UnknownNameError
from evo_hpo.levels.build import build
from evo_hpo.levels.store import LevelStore
from evo_hpo.scoring.footprint import TYPICAL, ModelShape, _windows, configuration, footprint
from tests.scoring.test_task import model_folder
from tests.tiny import random_model

__all__ = ["model_folder"]

SMALL: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("name", "parameters"), [("1B", 1_235_814_400), ("8B", 8_030_261_248), ("70B", 70_553_706_496)]
)
def test_typical_shapes_have_the_published_numbers_of_parameters(name: str, parameters: int) -> None:
    shape = ModelShape.of(configuration(name))
    assert shape.parameters == parameters
    assert shape.key_values == 2 * TYPICAL[name]["num_hidden_layers"] * 8 * shape.hidden // (
        64 if name == "70B" else 32
    )


def test_levels_and_weights_take_what_is_predicted(model_folder: Path, tmp_path: Path) -> None:
    build(str(model_folder), tmp_path / "store", method="rtn", levels=[2, 3, 8], group_size=16)
    store = LevelStore.open(tmp_path / "store", torch.bfloat16)
    decoded = sum(
        w.nbytes
        for u in range(len(store.units))
        for k in range(3)
        for w in store.weights(u, k).values()
        if w is not None
    )
    assert not store._packed  # what is decoded is not kept packed too
    shape = ModelShape.of(LlamaConfig.from_pretrained(model_folder))
    predicted = {m: footprint(shape, [2, 3, 8], memory=m, group_size=16) for m in ("resident", "packed")}
    assert predicted["resident"].levels == decoded
    on_disk = sum(level.storage for unit in store.manifest.units for level in unit.levels) / 8
    assert predicted["packed"].levels == pytest.approx(on_disk, rel=0.03)
    assert predicted["resident"].weights == 2 * shape.parameters


def test_experts_are_searched_layers_as_a_build_has_them() -> None:
    """Of Mixtral 8x7B all but embedding, head, routers and norms: numbers of its published configuration."""
    shape = ModelShape.of(MixtralConfig())
    attention, experts = 2 * 4096 * 4096 + 2 * 4096 * 1024, 8 * 3 * 4096 * 14336
    assert shape.parameters == 46_702_792_704
    assert shape.linear == 32 * (attention + experts)
    assert shape.largest == 4096 * 14336


def test_packed_levels_are_the_same_weights(model_folder: Path, tmp_path: Path) -> None:
    build(str(model_folder), tmp_path / "store", method="rtn", levels=[2, 3], group_size=16)
    resident, packed = (LevelStore.open(tmp_path / "store", memory=m) for m in ("resident", "packed"))
    for unit in range(len(resident.units)):
        for name, weight in resident.weights(unit, 1).items():
            other = packed.weights(unit, 1)[name]
            assert weight is not None
            assert other is not None
            assert torch.equal(weight, other)


def test_on_a_cpu_the_process_counts_and_every_core_has_an_assignment_of_its_own() -> None:
    shape = ModelShape.of(configuration("1B"))
    one, two = (footprint(shape, [2, 4], memory="packed", on_cpu=True, replicas=n) for n in (1, 2))
    assert one.process > 0
    assert two.decoding - one.decoding == 2 * shape.linear
    assert footprint(shape, [2, 4], memory="packed").process == 0
    assert CliRunner().invoke(app, ["plan-memory", "1B", "--cpu", "2"]).exit_code == 0


def test_packed_copies_of_weights_count_up_to_their_limit() -> None:
    shape = ModelShape.of(configuration("1B"))
    plain, compiled, single = (
        footprint(shape, [2], on_cpu=True, number=number, compiled=compiled, sequence_length=256)
        for number, compiled in ((2, False), (2, True), (4, False))
    )
    assert plain.copies == 0
    assert compiled.copies == 2 * (shape.linear + 128256 * 2048)
    assert single.copies == 2**31 + 4 * 128256 * 2048  # of the layers no more than the limit
    assert compiled.running > 3 * plain.running  # four sequences of 256 tokens in a pass
    assert compiled.total - plain.total > compiled.copies
    assert footprint(shape, [2], compiled=True).copies == 0


@pytest.mark.parametrize(("memory", "sets"), [("resident", 3), ("packed", 8), ("streamed", 0)])
def test_replicas_with_other_levels_in_place_have_packed_copies_of_their_own(memory: str, sets: int) -> None:
    shape = ModelShape.of(configuration("1B"))
    found = footprint(shape, [2, 3, 4], memory=memory, on_cpu=True, compiled=True, replicas=8)
    assert found.copies == 2 * (sets * shape.linear + (128256 * 2048 if sets else 0))


def test_of_a_streamed_model_two_blocks_are_on_the_device() -> None:
    shape = ModelShape.of(configuration("70B"))
    streamed = footprint(shape, [2, 4], memory="streamed")
    embedding_head_and_norms = 2 * 128256 * 8192 + (2 * 80 + 1) * 8192
    block = 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    assert streamed.weights == 2 * (embedding_head_and_norms + 2 * block)
    assert streamed.levels == 0
    on_cpu, packed = (footprint(shape, [2], memory=m, on_cpu=True, replicas=3) for m in ("streamed", "packed"))
    assert packed.total - on_cpu.total == 2 * 3 * (80 - 2) * block  # of a CPU's memory blocks and levels take some too


@pytest.mark.parametrize(
    ("device", "verdicts"),
    [
        ("100 GB", ["fits", "fits", "fits"]),
        ("80 GB", ["needs packed levels", "fits", "fits"]),
        ("24 GB", ["needs 4 devices, or streamed", "needs 3 devices, or streamed", "fits"]),
        ("4 GB", ["needs 24 devices", "needs 15 devices", "does not fit"]),
    ],
)
def test_verdicts_name_the_least_that_is_needed(device: str, verdicts: list[str]) -> None:
    output = CliRunner().invoke(app, ["plan-memory", "8B", "--device", device]).output
    rows = [line.split("│") for line in output.splitlines() if line.startswith("│ 8B")]
    assert [row[8].strip() for row in rows] == verdicts


def test_the_command_says_what_fits() -> None:
    told = CliRunner().invoke(app, ["plan-memory", "1B", "70B", "--device", "24 GB"]).output
    assert "fits" in told
    assert "devices" in told
    with pytest.raises(InvalidSettingError, match="device='24' must be a size above 0 with its unit"):
        CliRunner().invoke(app, ["plan-memory", "1B", "--device", "24"], catch_exceptions=False)
    with pytest.raises(UnknownNameError, match="no compression method 'magic'"):
        CliRunner().invoke(app, ["plan-memory", "1B", "--method", "magic"], catch_exceptions=False)
    for option in ("--group-size", "--sequence-length", "--calibration-tokens", "--held-out-tokens"):
        assert CliRunner().invoke(app, ["plan-memory", "1B", option, "0"]).exit_code == 2


def memory(*words: str) -> list[list[str]]:
    """Rows of the command's table on the 8B shape."""
    wide = {"COLUMNS": "160"}
    output = CliRunner().invoke(app, ["plan-memory", "8B", *words], catch_exceptions=False, env=wide).output
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│ 8B")]


def test_levels_that_are_not_given_are_those_of_the_method() -> None:
    linear = ModelShape.of(configuration("8B")).linear
    assert [row[2] for row in memory()] == [row[2] for row in memory("--levels", "2,3,4,5,6")]
    resident, packed, _ = memory("--method", "sparsegpt")
    assert float(resident[2]) == pytest.approx(5 * 2 * linear / 1e9, abs=0.06)
    kept = sum(1 - share for share in (0.3, 0.4, 0.5, 0.6, 0.7))
    in_place, decoding = 2 * linear, 14336 * 4096 * 10
    assert float(packed[2]) == pytest.approx((linear * (2 * kept + 5 / 8) + in_place + decoding) / 1e9, abs=0.06)
    assert memory("--method", "magnitude") == [resident, packed, _] == memory("--method", "wanda")
    q4_0 = memory("--method", "ggml", "--levels", "Q4_0")[1]
    assert float(q4_0[2]) == pytest.approx((linear * 4.5 / 8 + in_place + decoding) / 1e9, abs=0.06)


def test_what_is_dropped_takes_no_memory_and_lies_in_one_place() -> None:
    (row,) = memory("--method", "drop")
    assert row[:3] == ["8B, resident", "16.1", "0.0"]
    found = footprint(ModelShape.of(configuration("1B")), (1.0, 2.0), method="drop", on_cpu=True, replicas=4, number=4)
    one = footprint(ModelShape.of(configuration("1B")), (3,), on_cpu=True, replicas=4, number=4)
    assert (found.levels, found.decoding, found.copies) == (0, 0, one.copies)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "wanda", "--levels", "2,3"), "sparsity '2' must be a number from 0 to 1"),
        (("--method", "gptq", "--levels", "0.5"), "bit-width '0.5' must be a whole number from 1 to 8"),
        (("--method", "rtn", "--levels", "4,9"), "1 to 8"),
        (("--method", "drop", "--levels", "2"), "leave levels out"),
        (("--method", "ggml", "--levels", "Q4_K_M"), "no ggml type"),
    ],
)
def test_levels_that_a_method_has_not_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        memory(*words)


KEY_VALUES: dict[str, tuple[Callable[[], PretrainedConfig], bool]] = {
    "llama": (lambda: LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2), True),
    "falcon": (lambda: FalconConfig(**SMALL, multi_query=True, new_decoder_architecture=False, alibi=False), True),
    "qwen3_next": (
        lambda: Qwen3NextConfig(
            **SMALL | {"num_hidden_layers": 4},
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            shared_expert_intermediate_size=16,
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        True,
    ),
    "gemma2": (
        lambda: Gemma2Config(
            **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=5, query_pre_attn_scalar=8
        ),
        False,  # transformers keeps one token of a window less: the newest is not in the cache yet
    ),
}


@pytest.mark.parametrize("name", KEY_VALUES)
def test_the_key_value_cache_is_that_of_transformers(name: str) -> None:
    make, exact = KEY_VALUES[name]
    config = make()
    shape, model = ModelShape.of(config), random_model(config)
    cache = model(torch.ones(1, 16, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers if hasattr(layer, "keys"))
    assert 0 <= shape.cached(16) - held <= (0 if exact else 2 * 2 * 8)


def test_a_latent_vector_is_cached_once_and_shared_heads_once() -> None:
    """576 numbers a block and token of DeepSeek-V3 (its report, section 2.1.1); Falcon 40B has 8 heads of 64."""
    small = SMALL | {"num_attention_heads": 4, "num_hidden_layers": 2}
    latent = DeepseekV3Config(
        **small, kv_lora_rank=512, qk_rope_head_dim=64, n_routed_experts=8, n_group=1, topk_group=1
    )
    assert ModelShape.of(latent).cached(10) == 10 * 2 * 576
    grouped = FalconConfig(**small | {"hidden_size": 16 * 64, "num_attention_heads": 16}, num_kv_heads=8)
    grouped.new_decoder_architecture = True
    assert ModelShape.of(grouped).cached(1) == 2 * 2 * 8 * 64


def test_blocks_keep_keys_and_values_unless_they_are_known_to_have_no_attention() -> None:
    kinds = ["indexed_attention", "conv", "sliding_attention", "linear_attention", "mlp", "moe", "full_attention"]
    text = SimpleNamespace(layer_types=kinds, sliding_window=4)
    assert _windows(text, len(kinds)) == (4, [False, True, False])
