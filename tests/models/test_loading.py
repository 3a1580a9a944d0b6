"""Loading, fingerprints, and the parts of a model, on small random models of many architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evo_hpo.errors import ModelError
from evo_hpo.models.experts import LinearExperts, unfuse_experts
from evo_hpo.models.loading import resolve_folder
from evo_hpo.models.structure import decoder_blocks, droppable_modules, linear_modules
from tests.tiny import ARCHITECTURES, tiny_mixtral, tiny_model, tiny_tokens

LINEAR_LAYERS_A_BLOCK = {"llama": 7, "qwen2": 7, "qwen3": 7, "gemma2": 7, "gpt2": 4, "opt": 6, "gpt_neox": 4}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_and_linear_layers_are_found(architecture: str) -> None:
    model = tiny_model(architecture)
    assert len(decoder_blocks(model)) == 3
    found = linear_modules(model)
    assert len(found) == 3 * LINEAR_LAYERS_A_BLOCK.get(architecture, 7)
    assert all(model.get_submodule(name) is module for name, module in found.items())
    assert not any("lm_head" in name or "embed" in name for name in found)


def test_linear_layers_are_chosen_by_expressions() -> None:
    model = tiny_model("llama")
    assert len(linear_modules(model, include=r"\.mlp\.")) == 9
    assert len(linear_modules(model, exclude=r"[qkv]_proj")) == 12
    with pytest.raises(ModelError, match="nothing_like_this"):
        linear_modules(model, include="nothing_like_this")


def test_attention_and_mlp_modules_are_found() -> None:
    model = tiny_model("llama")
    assert list(droppable_modules(model, "attention")) == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert list(droppable_modules(model, "mlp")) == [f"model.layers.{i}.mlp" for i in range(3)]
    assert list(droppable_modules(tiny_model("opt"), "mlp")) == [f"model.decoder.layers.{i}.fc2" for i in range(3)]
    with pytest.raises(ModelError, match="'block'"):
        droppable_modules(model, "head")


def test_experts_taken_apart_compute_the_same() -> None:
    model: Any = tiny_mixtral()
    ids = tiny_tokens(4, 12)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        assert unfuse_experts(model) == 2
        assert isinstance(model.model.layers[0].mlp.experts, LinearExperts)
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert sum("experts" in name for name in linear_modules(model)) == 2 * 3 * 3
    assert unfuse_experts(model) == 0


def test_missing_models_are_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve_folder(str(tmp_path))
    with pytest.raises(ModelError, match="existing file"):
        resolve_folder(str(tmp_path / "model.gguf"))
    with pytest.raises(ModelError, match="not installed"):
        resolve_folder("pypi:surely-no-such-package")
