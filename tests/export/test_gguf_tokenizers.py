"""Tokenizers written into GGUF files: llama.cpp cuts text as they do, and others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from tokenizers import Tokenizer, models, normalizers, trainers

from evo_hpo.errors import ModelError
from evo_hpo.export.evaluation import evaluate
from evo_hpo.export.gguf_check import difference
from evo_hpo.export.gguf_file import write_gguf
from evo_hpo.export.llama_cpp import LlamaCpp
from evo_hpo.models.loading import LoadedModel, load_model
from tests.export.gguf_models import (
    FAST,
    MODELS,
    SIZES,
    TEXTS,
    Blocks,
    byte_level_tokenizer,
    compressed,
    levels_of,
    made,
)


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_byte_level_tokenizers_cut_text_alike(split: str, tmp_path: Path) -> None:
    fast = byte_level_tokenizer(split)
    loaded = made(transformers.LlamaConfig(**SIZES | {"vocab_size": 400, "num_hidden_layers": 1}))
    loaded = LoadedModel(loaded.model, fast, loaded.identity, loaded.name)
    levels = levels_of(loaded, ["Q8_0"], tmp_path / "store")
    write_gguf(tmp_path / "m.gguf", loaded, levels, [0] * len(levels.units))
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"].contents() == split
    with LlamaCpp(tmp_path / "m.gguf") as program:
        for text in TEXTS:
            assert program.tokens(text) == fast(text, add_special_tokens=False)["input_ids"]
    assert difference(tmp_path / "m.gguf", compressed(loaded, levels, [0] * len(levels.units))) < 1e-2


def test_a_file_beside_the_folder_it_was_made_from_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read from the file has other rules for the same tokens."""
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    fast = byte_level_tokenizer("smollm")
    model: Any = made(transformers.LlamaConfig(**SIZES | {"vocab_size": len(fast), "num_hidden_layers": 1})).model
    model.save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    levels = Blocks(loaded, ["Q8_0"]).levels
    write_gguf(tmp_path / "m.gguf", loaded, levels, [0] * len(levels.units))
    (tmp_path / "text.txt").write_text(TEXTS[0] * 40)
    text = f"whole:{tmp_path / 'text.txt'}"
    settings: dict[str, Any] = {"original": str(tmp_path / "model"), "sequence_length": 32, "tokens": 64}
    table = evaluate([str(tmp_path / "m.gguf")], [text], **settings)
    figures = table.results[1].texts[text].kl
    assert figures is not None
    assert 0 < figures.mean < 0.05
    rules = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:1]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(ModelError, match="another tokenizer"):
        evaluate([str(tmp_path / "m.gguf")], [text], **settings)


def test_a_tokenizer_that_is_cut_otherwise_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    fast = FAST(tokenizer_object=tokenizer)
    loaded = made(MODELS["llama"]())
    levels = levels_of(loaded, ["Q8_0"], tmp_path / "store")
    with pytest.raises(ModelError, match="tokenizer of type 'WordLevel' is not written: convert the model"):
        write_gguf(
            tmp_path / "m.gguf", LoadedModel(loaded.model, fast, loaded.identity, ""), levels, [0] * len(levels.units)
        )


def test_tokenizers_with_byte_fallback_cut_text_alike(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXTS[0].replace("\t", " ")] * 3 + ["return things don't count"] * 2, trainer)
    rules = json.loads(tokenizer.to_str())
    rules["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    rules["added_tokens"] = rules["added_tokens"][:3]
    size = len(rules["model"]["vocab"])
    fast = FAST(tokenizer_object=Tokenizer.from_str(json.dumps(rules)), bos_token="<s>", eos_token="</s>")
    loaded = made(transformers.LlamaConfig(**SIZES | {"vocab_size": size, "num_hidden_layers": 1}))
    loaded = LoadedModel(loaded.model, fast, loaded.identity, loaded.name)
    levels = levels_of(loaded, ["Q8_0"], tmp_path / "store")
    write_gguf(tmp_path / "m.gguf", loaded, levels, [0] * len(levels.units))
    with LlamaCpp(tmp_path / "m.gguf") as program:
        for text in TEXTS:
            assert program.tokens(text) == fast(text, add_special_tokens=False)["input_ids"]
