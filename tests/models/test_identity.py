"""Identity is of content: all of it, whatever it is called, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from evo_hpo.models import loading
from evo_hpo.models.identity import (
    CONFIGURATION,
    WEIGHTS,
    differences,
    folder_identity,
    model_identity,
    tokenizer_identity,
    tokens_identity,
)
from evo_hpo.models.loading import LoadedModel
from tests.tiny import tiny_model


def saved(folder: Path, **changes: Any) -> Path:
    model: Any = tiny_model("llama")
    model.save_pretrained(folder, **changes)
    return folder


def test_a_folder_is_its_weights_and_what_changes_outputs(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    before = folder_identity(folder)
    (folder / "note.txt").write_text("something else")
    assert folder_identity(saved(tmp_path / "b")) == before == folder_identity(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "use_cache": False}))
    assert folder_identity(folder) == before
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    found = folder_identity(folder)
    assert found[WEIGHTS] == before[WEIGHTS]
    assert found[CONFIGURATION] != before[CONFIGURATION]


def test_one_byte_anywhere_in_a_large_file_counts_also_at_equal_size_and_time(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    weights = folder / "model.safetensors"
    with weights.open("ab") as file:
        file.write(bytes(40 << 20))
    before, stat = folder_identity(folder), weights.stat()
    with weights.open("r+b") as file:
        file.seek((40 << 20) - 77_777)
        file.write(b"\x01")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert folder_identity(folder)[WEIGHTS] != before[WEIGHTS]


def test_a_model_in_memory_is_every_value_and_its_configuration() -> None:
    before = model_identity(tiny_model("llama"))
    assert model_identity(tiny_model("llama")) == before == LoadedModel.from_model(tiny_model("llama")).identity
    for number in (0, 1, 1000):  # an odd place too: not only sampled values count
        model: Any = tiny_model("llama")
        model.model.layers[1].mlp.up_proj.weight.data.reshape(-1)[number] += 1
        assert model_identity(model)[WEIGHTS] != before[WEIGHTS]
    model = tiny_model("llama")
    model.config.rms_norm_eps = 0.1
    assert model_identity(model) == {**before, CONFIGURATION: model_identity(model)[CONFIGURATION]}
    assert model_identity(model) != before
    assert model_identity(tiny_model("llama").bfloat16()) != before


def test_tokenizers_of_equal_size_are_told_apart() -> None:
    fast: Any = PreTrainedTokenizerFast
    made = [
        fast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="?")))
        for words in ({"?": 0, "x": 1, "y": 2}, {"?": 0, "x": 2, "y": 1}, {"?": 0, "x": 1, "y": 2})
    ]
    first, second, third = map(tokenizer_identity, made)
    assert first == third != second


def test_tokens_count_in_their_order() -> None:
    tokens = torch.arange(12).view(3, 4)
    assert tokens_identity(tokens) == tokens_identity(tokens.int())
    assert len({tokens_identity(t) for t in (tokens, tokens.view(4, 3), tokens.flip(0))}) == 3


def test_differences_are_words_and_only_of_what_both_name() -> None:
    assert differences({"store": "a", "dtype": "float32"}, {"store": "b"}) == "store (was a, is b)"
    assert differences({"store": "a"}, {"store": "a", "tokenizer": "t"}) == ""


def test_a_gguf_file_of_equal_size_and_head_is_converted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))

    def convert(path: Path, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(path.read_bytes()[-1]))

    monkeypatch.setattr(loading, "_dequantize_gguf", convert)
    path, found = tmp_path / "model.gguf", []
    for last in (b"\x01", b"\x02"):
        path.write_bytes(bytes(2 << 20) + last)
        found.append(loading.resolve_folder(str(path)))
    assert [json.loads((folder / "config.json").read_text()) for folder in found] == [1, 2]


def test_an_index_says_which_files_are_the_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    before = folder_identity(folder)
    save_file(tensors, folder / "original.safetensors", {"format": "pt"})  # what is not loaded does not count
    assert folder_identity(folder) == before
    (folder / "model.safetensors").unlink()
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / "other.safetensors", {"format": "pt"})
    found = []
    for name in ("original.safetensors", "other.safetensors", "missing.safetensors"):
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        found.append(folder_identity(folder)[WEIGHTS])
        if name != "missing.safetensors":
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
            factor = loaded.model.norm.weight.detach() / tensors["model.norm.weight"]
            assert float(factor.mean()) == pytest.approx(1 if name.startswith("original") else 2)
    assert len(set(found)) == 3
    assert found[0] == before[WEIGHTS]
