"""Blocks that leave a GGUF file, and what a template gives to one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers

from evo_hpo.errors import ModelError
from evo_hpo.export.gguf_file import write_gguf
from evo_hpo.export.gguf_header import copy_header
from evo_hpo.levels.drop import build_drop_store
from evo_hpo.levels.store import open_store
from tests.export.gguf_models import (
    MODELS,
    SIZES,
    Blocks,
    compressed,
    distance,
    levels_of,
    made,
)
from tests.tiny import tiny_tokens


def test_dropped_blocks_leave_the_file_and_dropped_parts_say_nothing(tmp_path: Path) -> None:
    loaded = made(transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 3}))
    build_drop_store(loaded, tmp_path / "store", kinds=("attention", "mlp"))
    levels = open_store(tmp_path / "store").levels
    silent = {"model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp"}
    assignment = [int(unit.name not in silent) for unit in levels.units]
    write_gguf(tmp_path / "m.gguf", loaded, levels, assignment)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {t.name.split(".")[1] for t in reader.tensors if t.name.startswith("blk.")} == {"0", "1"}
    assert reader.fields["llama.block_count"].contents() == 2
    assert distance(tmp_path / "m.gguf", compressed(loaded, levels, assignment).model) < 1e-5
    with pytest.raises(ModelError, match="drops every block"):
        write_gguf(tmp_path / "n.gguf", loaded, levels, [0] * len(levels.units))


def test_blocks_of_gemma_2_keep_their_windows_when_others_are_dropped(tmp_path: Path) -> None:
    """Every other block attends within a window, in llama.cpp by its number in the file."""
    config = transformers.Gemma2Config(
        **SIZES | {"num_hidden_layers": 4}, head_dim=64, query_pre_attn_scalar=64, sliding_window=16
    )
    loaded = made(config)
    build_drop_store(loaded, tmp_path / "store", kinds=("block",))
    levels = open_store(tmp_path / "store").levels
    tokens = [int(token) for token in tiny_tokens(1, 96, seed=3)[0]]
    for assignment, blocks in (([1, 1, 1, 1], 4), ([0, 1, 1, 1], 4), ([1, 1, 1, 0], 3), ([0, 0, 1, 1], 2)):
        write_gguf(tmp_path / "m.gguf", loaded, levels, assignment)
        assert gguf.GGUFReader(tmp_path / "m.gguf").fields["gemma2.block_count"].contents() == blocks
        assert distance(tmp_path / "m.gguf", compressed(loaded, levels, assignment).model, tokens) < 1e-4


def test_a_gemma_2_that_llama_cpp_computes_otherwise_is_refused(tmp_path: Path) -> None:
    loaded = made(MODELS["gemma2"]())
    levels = Blocks(loaded, ["Q8_0"], "layers").levels
    write_gguf(tmp_path / "t.gguf", loaded, levels, [0] * len(levels.units))
    config: Any = loaded.model.config
    config.query_pre_attn_scalar = 144
    for template in (None, tmp_path / "t.gguf"):
        with pytest.raises(ModelError, match="query_pre_attn_scalar=144 .* of 2 blocks, 64: .* export a folder"):
            write_gguf(tmp_path / "m.gguf", loaded, levels, [0] * len(levels.units), template=template)
    config.query_pre_attn_scalar, config.layer_types = 64, ["full_attention", "full_attention"]
    with pytest.raises(ModelError, match="windows in every other block"):
        write_gguf(tmp_path / "m.gguf", loaded, levels, [0] * len(levels.units))
    assert not (tmp_path / "m.gguf").exists()


def test_a_template_gives_its_header_and_what_was_not_searched(tmp_path: Path) -> None:
    loaded = made(MODELS["llama"]())
    levels = levels_of(loaded, ["Q4_K", "F16"], tmp_path / "store")
    write_gguf(tmp_path / "t.gguf", loaded, levels, [1] * len(levels.units), types={"token_embd.weight": "Q8_0"})
    template = gguf.GGUFReader(tmp_path / "t.gguf")
    write_gguf(tmp_path / "m.gguf", loaded, levels, [0] * len(levels.units), template=tmp_path / "t.gguf")
    found = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {k: f.contents() for k, f in found.fields.items()} == {k: f.contents() for k, f in template.fields.items()}
    before, after = ({t.name: t for t in reader.tensors} for reader in (template, found))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.startswith("blk.") and "norm" not in name:
            assert tensor.tensor_type.name == "Q4_K"
        else:
            assert np.array_equal(tensor.data, before[name].data)
    other = made(MODELS["qwen3"]())
    with pytest.raises(ModelError, match="template is of architecture 'llama', the model's is 'qwen3'"):
        write_gguf(tmp_path / "n.gguf", other, levels, [0] * len(levels.units), template=tmp_path / "t.gguf")


def test_experts_that_were_not_searched_are_those_of_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = made(MODELS["mixtral"]())
    full = Blocks(loaded, ["Q4_0"]).levels
    forgotten: list[Path] = []
    monkeypatch.setattr("evo_hpo.export.gguf_file.forget", forgotten.append)
    write_gguf(tmp_path / "t.gguf", loaded, full, [0] * len(full.units))
    assert forgotten == [tmp_path / "t.gguf"]
    lines = (tmp_path / "t.gguf.tensor-types.txt").read_text()
    assert "ffn_gate_exps" in lines
    assert "ffn_gate_inp" not in lines, "routers are F32, which llama-quantize leaves"
    attention = Blocks(loaded, ["Q8_0"], "self_attn").levels
    write_gguf(tmp_path / "m.gguf", loaded, attention, [0] * len(attention.units), template=tmp_path / "t.gguf")
    before, after = ({t.name: t for t in gguf.GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in "tm")
    for name, tensor in after.items():
        searched = ".attn_" in name and "norm" not in name
        assert tensor.tensor_type.name == ("Q8_0" if searched else before[name].tensor_type.name)
        assert searched or np.array_equal(tensor.data, before[name].data)


def test_a_template_may_be_aligned_otherwise(tmp_path: Path) -> None:
    loaded = made(MODELS["llama"]())
    levels = Blocks(loaded, ["Q8_0"], "layers").levels
    write_gguf(tmp_path / "a.gguf", loaded, levels, [0] * len(levels.units))
    reader, writer = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    copy_header(writer, reader, 2)
    writer.add_custom_alignment(64)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_gguf(tmp_path / "m.gguf", loaded, levels, [0] * len(levels.units), template=tmp_path / "t.gguf")
    assert distance(tmp_path / "m.gguf", compressed(loaded, levels, [0] * len(levels.units)).model) < 3e-3
