"""What is compared with llama-quantize: its importance matrix file, the types in a file, and which blocks differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from benchmarks.measurements.compression.llama_quantize import differences, importance_matrix, types, write_importance
from evo_hpo.errors import ModelError
from evo_hpo.export.gguf_file import write_gguf
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.ggml import quantize
from evo_hpo.levels.packing import GgmlBlocks
from evo_hpo.levels.quantizers import Ggml
from evo_hpo.levels.store import open_store
from evo_hpo.models.structure import linear_modules
from tests.export.gguf_models import MODELS, SIZES, levels_of, made
from tests.tiny import tiny_tokens


def test_an_importance_matrix_file_holds_the_weights_that_a_store_is_built_with(tmp_path: Path) -> None:
    loaded, tokens = made(transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1})), tiny_tokens(4, 32, seed=1)
    write_importance(tmp_path / "i.gguf", loaded, importance_matrix(loaded, tokens), "some text")
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    held = {tensor.name: tensor.data for tensor in reader.tensors}
    assert reader.fields["imatrix.datasets"].contents() == ["some text"]
    assert len(held) == 2 * 7

    seen: dict[str, torch.Tensor] = {}
    pairs = {"self_attn.v_proj": "attn_v", "mlp.down_proj": "ffn_down", "self_attn.o_proj": "attn_output"}
    block: Any = loaded.model.get_submodule("model.layers.0")
    for layer in pairs:
        block.get_submodule(layer).register_forward_pre_hook(
            lambda _, arguments, layer=layer: seen.update({layer: arguments[0].flatten(0, 1)})
        )
    with torch.inference_mode():
        model: Any = loaded.model
        model(input_ids=tokens)
    build_store(loaded, tmp_path / "store", Ggml(["Q4_K"]), tokens, inputs="dense")
    levels = open_store(tmp_path / "store").levels
    for layer, name in pairs.items():
        found = torch.from_numpy(held[f"blk.0.{name}.weight.in_sum2"] / held[f"blk.0.{name}.weight.counts"]).flatten()
        squares = seen[layer].double().square().mean(0)
        torch.testing.assert_close(found.double(), squares / squares.mean(), rtol=1e-4, atol=1e-6)
        unit = next(number for number, unit in enumerate(levels.units) if unit.name.endswith(layer))
        (blocks,) = levels.encoded(unit, 0).values()
        assert isinstance(blocks, GgmlBlocks)
        assert torch.equal(blocks.blocks, quantize(block.get_submodule(layer).weight, "Q4_K", found))


def test_experts_whose_names_are_one_in_llama_cpp_are_refused(tmp_path: Path) -> None:
    loaded = made(MODELS["mixtral"]())
    weights = {name: torch.ones(256) for name in linear_modules(loaded.model)}
    with pytest.raises(ModelError, match=r"'model.layers.0.mlp.experts.0.gate_proj' has no name of its own"):
        write_importance(tmp_path / "i.gguf", loaded, weights, "some text")
    assert not list(tmp_path.iterdir())


def test_files_are_compared_block_by_block(tmp_path: Path) -> None:
    loaded = made(transformers.LlamaConfig(**SIZES))
    levels = levels_of(loaded, ["Q4_0", "Q8_0"], tmp_path / "store")
    paths = [tmp_path / f"{name}.gguf" for name in "abc"]
    mixed = [unit.name.endswith("0.self_attn.k_proj") for unit in levels.units]
    for path in paths:
        write_gguf(path, loaded, levels, [int(path == paths[2] and one) for one in mixed])
    assert differences(paths[0], paths[1]) == {}
    assert differences(paths[0], paths[2]) == {"blk.0.attn_k.weight": "32768 weights in Q4_0 and 32768 weights in Q8_0"}
    assert types(paths[2])["attn_k"] == {"Q4_0": "1", "Q8_0": "0"}
    assert types(paths[2])["attn_q"] == {"Q4_0": "0-1"}
    assert types(paths[2])["token_embd"] == {"F16": "0"}
    tensor = next(t for t in gguf.GGUFReader(paths[1]).tensors if t.name == "blk.1.ffn_up.weight")
    with paths[1].open("r+b") as file:  # two bytes of the third block of 18
        file.seek(tensor.data_offset + 2 * 18)
        file.write(bytes(np.bitwise_xor(tensor.data.reshape(-1)[36:38], 1)))
    assert differences(paths[0], paths[1]) == {"blk.1.ffn_up.weight": "1 of 2048 blocks of Q4_0"}
