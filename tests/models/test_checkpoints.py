"""Checkpoints that are damaged, incomplete, quantized or not finite are refused in one line before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from evo_hpo.errors import ModelError
from evo_hpo.models.loading import load_model
from evo_hpo.models.text import load_tokens
from tests.models.test_text import Characters
from tests.tiny import ARCHITECTURES, tiny_mixtral, tiny_model


def saved(folder: Path, architecture: str = "llama") -> Path:
    model: Any = tiny_mixtral() if architecture == "mixtral" else tiny_model(architecture)
    model.save_pretrained(folder)
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0, "x": 1}, unk_token="?"))).save_pretrained(folder)
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral"])
def test_whole_checkpoints_load_tied_heads_included(architecture: str, tmp_path: Path) -> None:
    assert load_model(str(saved(tmp_path, architecture))).tokenizer is not None


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), f"1 missing tensor, such as '{UP}'"),
        (lambda t: [t.pop(UP), t.pop("lm_head.weight")], "2 missing tensors, such as 'lm_head.weight'"),
        (lambda t: t.update({"model.layers.9.x": torch.ones(2)}), "1 unexpected tensor, such as 'model.layers.9.x'"),
        (lambda t: t.update({UP: t[UP][:-1].contiguous()}), f"1 mismatched tensor, such as '{UP}'"),
        (lambda t: t[UP].view(-1)[5].fill_(float("nan")), f"'{UP}' holds values that are not finite"),
        (lambda t: t["model.norm.weight"][0].fill_(-float("inf")), "'model.norm.weight' holds values"),
    ],
)
def test_a_checkpoint_with_a_faulty_tensor_is_refused_by_its_name(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    rewritten(saved(tmp_path), change)
    with pytest.raises(ModelError) as caught:
        load_model(str(tmp_path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_models_compute_themselves_may_be_in_a_checkpoint(tmp_path: Path) -> None:
    rewritten(saved(tmp_path), lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_model(str(tmp_path))


def test_weights_beyond_half_precision_are_refused_in_it_only(tmp_path: Path) -> None:
    rewritten(saved(tmp_path), lambda t: t[UP].view(-1)[5].fill_(70000.0))
    load_model(str(tmp_path), torch.bfloat16)
    with pytest.raises(ModelError, match="not finite in float16"):
        load_model(str(tmp_path), torch.float16)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _config(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "cannot load a causal language model"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot load a causal language model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load a causal language model"),
        (_config(quantization_config={"quant_method": "gptq", "bits": 4}), r"is quantized already \(gptq\)"),
        (_config(quantization_config="awq"), r"is quantized already \(awq\)"),
        (_config(quantization_config=["x"]), r"is quantized already \(\['x'\]\)"),
        (_config(num_attention_heads=3), r"hidden size \(32\) is not a multiple"),
        (lambda folder: (folder / "config.json").write_text("{"), r"damaged config\.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"damaged config\.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot load a tokenizer"),
    ],
)
def test_damaged_files_are_refused(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    damage(saved(tmp_path))
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
def test_tokens_that_the_model_does_not_know_are_refused() -> None:
    class Larger(Characters):
        def __call__(self, text: str | list[str], **settings: Any) -> dict[str, Any]:
            ids = super().__call__(text, **settings)["input_ids"]
            return {"input_ids": [i + 50 for i in ids] if isinstance(text, str) else [[i + 50 for i in x] for x in ids]}

    model = tiny_model("llama")
    load_tokens("pydoc", Characters(), 16, 640, model=model)
    with pytest.raises(ModelError, match=r"gives token 1\d\d, the model knows 0 to 96"):
        load_tokens("pydoc", Larger(), 16, 640, model=model)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("text", ["pydoc", "self"])
def test_sequences_longer_than_learned_positions_are_refused(text: str) -> None:
    for architecture in ("gpt2", "opt"):
        model = tiny_model(architecture)
        assert load_tokens(text, Characters(), 64, 64, model=model).shape == (1, 64)
        with pytest.raises(ModelError, match=r"65 tokens are longer than the 64 positions .* at most 64"):
            load_tokens(text, Characters(), 65, 65, model=model)
    model = tiny_model("gpt_neox")  # rotary: no table of 64 positions
    assert load_tokens(text, Characters(), 70, 70, model=model).shape == (1, 70)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("data", [b"", b"GGUF" + bytes(20), b"no GGUF file"])
def test_a_file_that_is_no_gguf_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"cannot load a causal language model from '.*x\.gguf'") as caught:
        load_model(str(tmp_path / "x.gguf"))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache" / "models").iterdir())


@pytest.mark.parametrize("package", ["", "..x", "a b", "no.such-package"])
def test_a_package_that_is_none_is_refused(package: str) -> None:
    with pytest.raises(ModelError, match="is not installed"):
        load_model(f"pypi:{package}")
