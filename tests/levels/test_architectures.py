"""Architectures that no line of ours names: blocks and layers are found, compressed, dropped, and still run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.drop import build_drop_store
from evo_hpo.levels.quantizers import GPTQ
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import LoadedModel
from evo_hpo.models.structure import decoder_blocks, linear_modules
from tests.tiny import random_model

_SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GATED: dict[str, Any] = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
_OLD: dict[str, Any] = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_NO_SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

# name: (configuration, linear layers a block)
FURTHER: dict[str, tuple[Callable[[], transformers.PretrainedConfig], int]] = {
    "mistral": (lambda: transformers.MistralConfig(**_GATED, sliding_window=6), 7),
    "gemma": (lambda: transformers.GemmaConfig(**_GATED, head_dim=8), 7),
    "gemma3": (lambda: transformers.Gemma3TextConfig(**_GATED, head_dim=8, sliding_window=4), 7),
    "phi": (lambda: transformers.PhiConfig(**_SIZES, intermediate_size=48), 6),
    "phi3": (lambda: transformers.Phi3Config(**_GATED, **_NO_SPECIAL), 4),
    "stablelm": (lambda: transformers.StableLmConfig(**_GATED), 7),
    "olmo2": (lambda: transformers.Olmo2Config(**_GATED, **_NO_SPECIAL), 7),
    "smollm3": (lambda: transformers.SmolLM3Config(**_GATED, **_NO_SPECIAL), 7),
    "falcon": (lambda: transformers.FalconConfig(**_SIZES), 4),
    "bloom": (lambda: transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4), 4),
    "gptj": (lambda: transformers.GPTJConfig(**_OLD, rotary_dim=4, **_NO_SPECIAL), 6),
    "mpt": (lambda: transformers.MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, max_seq_len=64), 4),
}


@pytest.fixture(params=FURTHER)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    model = random_model(FURTHER[request.param][0](), spread=0.2)
    assert len(linear_modules(model)) == 2 * FURTHER[request.param][1]
    return LoadedModel.from_model(model, name=request.param)


def test_eight_bits_change_little_and_two_much(loaded: LoadedModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    build_store(loaded, tmp_path, GPTQ([2, 8], group_size=16), tokens, inputs="8")
    store = open_store(tmp_path)
    changes = []
    with torch.inference_mode():
        dense = loaded.model(input_ids=tokens).logits
        for level in (1, 0):
            for number, unit in enumerate(store.units):
                weight = store.weights(number, level)[unit.name]
                assert weight is not None
                loaded.model.get_submodule(unit.name).weight.data = weight
            compressed = loaded.model(input_ids=tokens).logits
            changes.append(float((compressed - dense).square().mean() / dense.square().mean()))
    assert changes[0] < 0.01 < changes[1]


def test_attention_and_mlp_can_be_dropped(loaded: LoadedModel, tmp_path: Path) -> None:
    build_drop_store(loaded, tmp_path)
    units = open_store(tmp_path).units
    assert len(units) == 2 * len(decoder_blocks(loaded.model)) == 4
    assert all(loaded.model.get_submodule(member) is not None for unit in units for member in unit.members)
