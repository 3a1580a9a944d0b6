"""ggml types as levels: llama.cpp's own blocks, decoded by another reader to the same bits."""

from __future__ import annotations

import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from evo_hpo.errors import InvalidSettingError, MissingPackageError
from evo_hpo.levels import ggml
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.build import check_settings
from evo_hpo.levels.compressor import Inputs
from evo_hpo.levels.ggml import GGML_TYPES, block_size, dequantize, quantize, row_bytes
from evo_hpo.levels.quantizers import Ggml
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import LoadedModel
from tests.tiny import random_model, tiny_tokens

PUBLISHED = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q6_K": 6.5625, "IQ1_S": 1.5625, "IQ2_XXS": 2.0625}
PUBLISHED |= {"IQ4_XS": 4.25, "IQ4_NL": 4.5, "Q5_0": 5.5, "Q8_0": 8.5, "MXFP4": 4.25, "F16": 16}


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32))


@pytest.mark.parametrize("name", GGML_TYPES)
def test_any_bytes_are_decoded_to_the_bits_that_another_reader_finds(name: str) -> None:
    data = np.random.default_rng(1).integers(0, 256, (64, row_bytes(name, 512)), dtype=np.uint8)
    with np.errstate(all="ignore"):  # scales of random bytes are NaN and infinite too
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
        assert np.array_equal(dequantize(torch.from_numpy(data), name).numpy(), expected, equal_nan=True)


SLOW = ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S")  # tables of these take seconds to make


@pytest.mark.parametrize("name", [name for name in GGML_TYPES if name not in SLOW])
def test_blocks_are_decoded_to_the_weights(name: str, weight: torch.Tensor) -> None:
    blocks = quantize(weight, name, torch.linspace(0.5, 2, 512))
    found = dequantize(blocks, name)
    assert blocks.shape == (8, row_bytes(name, 512))
    assert np.array_equal(found.numpy(), gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]))
    bits = 8 * blocks.numel() / weight.numel()
    assert bits == PUBLISHED.get(name, bits)
    error = float((found - weight).square().mean())
    assert error < 4.0 ** -min(bits, 8) * 6, "near what a Gaussian can be coded with at so many bits"


def test_types_rise_in_bits_a_weight() -> None:
    sizes = [row_bytes(name, 512) for name in GGML_TYPES]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0"])
def test_blocks_without_importance_are_those_of_another_writer(name: str, weight: torch.Tensor) -> None:
    ours = quantize(weight, name).numpy()
    assert np.array_equal(ours, gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name]))


def test_importance_moves_the_error_to_where_it_matters_least(weight: torch.Tensor) -> None:
    importance = torch.ones(512)
    importance[::2] = 100
    plain, weighted = (dequantize(quantize(weight, "Q2_K", chosen), "Q2_K") for chosen in (None, importance))
    errors = [((found - weight).square() * importance).sum() for found in (plain, weighted)]
    assert errors[1] < 0.8 * errors[0]


def test_threads_change_nothing(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    one = quantize(weight, "IQ3_XXS", torch.ones(512))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(quantize(weight, "IQ3_XXS", torch.ones(512)), one)


def test_an_expert_that_saw_no_token_is_quantized_as_if_all_inputs_were_alike(weight: torch.Tensor) -> None:
    unseen = Ggml(["IQ2_XXS"]).compress(weight, Inputs(torch.zeros(512), 512))[0]
    alike = Ggml(["IQ2_XXS"]).compress(weight, Inputs(None, 512))[0]
    assert torch.equal(unseen.encoded.decode(), alike.encoded.decode())
    assert unseen.error == alike.error > 0


def test_layers_get_the_types_that_divide_their_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2
    )
    loaded = LoadedModel.from_model(random_model(config, spread=0.2))
    with caplog.at_level(logging.WARNING, logger="evo_hpo"):
        build_store(loaded, tmp_path, Ggml(["q2_k", "q8_0", "iq4_nl"]), tiny_tokens(), inputs="dense")
    assert "12 of 14 layers have other levels: rows of 32 weights are no multiple of the blocks of Q2_K" in caplog.text
    store = open_store(tmp_path)
    for number, unit in enumerate(store.units):
        wide = unit.name.endswith("down_proj")
        assert unit.levels == (("Q2_K",) if wide else ()) + ("IQ4_NL", "Q8_0")
        assert unit.costs[-1] == unit.size * 17 // 2, "bits, exactly"
        assert store.errors[number] == tuple(sorted(store.errors[number], reverse=True))
    assert store.space(4.5).budget == sum(unit.size for unit in store.units) * 9 // 2


def test_layers_that_no_type_divides_stay_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    loaded = LoadedModel.from_model(random_model(config))
    with caplog.at_level(logging.WARNING, logger="evo_hpo"):
        build_store(loaded, tmp_path / "a", Ggml(["Q8_0"]), tiny_tokens(), inputs="dense")
    assert "6 of 7 layers stay as they are: rows of 48 weights" in caplog.text
    assert [unit.name for unit in open_store(tmp_path / "a").units] == ["model.layers.0.mlp.down_proj"]
    with pytest.raises(InvalidSettingError, match="no layer has rows that the blocks of Q4_K divide"):
        build_store(loaded, tmp_path / "b", Ggml(["Q4_K"]), tiny_tokens(), inputs="dense")


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_units_where_that_is_wanted(tied: bool, tmp_path: Path) -> None:
    """Columns of the head are weighted by what it is given, those of an embedding alone are not."""
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    config.tie_word_embeddings = tied
    loaded, tokens = LoadedModel.from_model(random_model(config, spread=0.2)), tiny_tokens()
    build_store(
        loaded, tmp_path / "all", Ggml(["Q4_0", "Q8_0"], embedding=True), tokens, inputs="dense", batch_tokens=24
    )
    build_store(loaded, tmp_path / "layers", Ggml(["Q4_0", "Q8_0"]), tokens, inputs="dense")
    store, layers = open_store(tmp_path / "all"), open_store(tmp_path / "layers")
    outer = ["model.embed_tokens"] + ["lm_head"] * (not tied)
    assert [u.name for u in store.units] == outer + [u.name for u in layers.units]
    for number in range(len(layers.units)):
        ((name, weight),) = layers.levels.weights(number, 0).items()
        assert torch.equal(weight, store.levels.weights(number + len(outer), 0)[name])  # type: ignore[arg-type]
    seen: list[torch.Tensor] = []
    head: torch.nn.Module = loaded.model.get_submodule("lm_head")
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).square().sum(0)))
    with torch.no_grad():
        loaded.model(input_ids=tokens)
    hook.remove()
    for number, name in enumerate(outer):
        dense = loaded.model.get_submodule(name).weight
        weights = seen[0] / seen[0].mean() if name == outer[-1] else torch.ones(32)
        expected = dequantize(quantize(dense, "Q4_0", weights), "Q4_0")  # type: ignore[arg-type]
        found = store.levels.weights(number, 0)[name]
        assert found is not None
        assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())
        assert store.units[number].costs == (97 * 32 * 9 // 2, 97 * 32 * 17 // 2)
    with_drops = store.levels.with_dropped()
    assert [len(u.levels) for u in with_drops.units] == [2] * len(outer) + [3] * len(layers.units)
    build_store(loaded, tmp_path / "less", Ggml(["Q8_0"], embedding=True), tokens, inputs="dense", exclude="embed")
    assert [u.name for u in open_store(tmp_path / "less").units if "layers" not in u.name] == outer[1:]


def test_settings_are_checked_before_anything_is_loaded() -> None:
    check_settings("ggml", ["Q4_K", "q8_0"], {"embedding": True})
    with pytest.raises(InvalidSettingError, match="embedding='Q8_0' must be true or false"):
        check_settings("ggml", ["Q4_K"], {"embedding": "Q8_0"})
    with pytest.raises(InvalidSettingError, match="no ggml type 'Q4_K_M'.*mixtures"):
        check_settings("ggml", ["Q4_K_M"], {})
    with pytest.raises(InvalidSettingError, match="inputs='Q4_K' must be .dense.$"):
        check_settings("ggml", ["Q4_K"], {"inputs": "Q4_K"})


def test_without_the_extra_stores_are_read_and_none_is_built(
    weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = {name: quantize(weight, name) for name in ("Q3_K", "IQ4_NL")}
    expected = {name: dequantize(found, name) for name, found in blocks.items()}
    monkeypatch.setattr(ggml, "_shared_object", lambda: None)
    ggml.library.cache_clear()
    ggml._decoder.cache_clear()
    try:
        assert all(torch.equal(dequantize(found, name), expected[name]) for name, found in blocks.items())
        with pytest.raises(MissingPackageError, match=r"pip install 'evo-hpo\[gguf\]'"):
            Ggml()
    finally:
        ggml.library.cache_clear()
        ggml._decoder.cache_clear()


def test_blocks_of_a_type_are_known() -> None:
    assert (block_size("Q4_K"), block_size("IQ4_NL"), block_size("F16")) == (256, 32, 1)
