"""Tokenizers written into GGUF files: llama.cpp cuts text as they do, and others are refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from evo_hpo.errors import ModelError
from evo_hpo.export.evaluation import evaluate
from evo_hpo.export.gguf_check import PROBE, difference
from evo_hpo.export.gguf_file import write_gguf
from evo_hpo.export.gguf_header import _splitting
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

SPLITS = ("gpt-2", "smollm", "qwen2", "llama-bpe", "tekken")


@pytest.mark.parametrize("split", SPLITS)
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


def test_the_probe_tells_every_way_of_cutting_text_from_the_others(tmp_path: Path) -> None:
    """Two neighbouring letters are a token wherever the text is not cut between them."""
    found: dict[str, list[int]] = {}
    for split in SPLITS:
        rules = json.loads(byte_level_tokenizer(split).backend_tokenizer.to_str())
        letters = pre_tokenizers.ByteLevel.alphabet()
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        data = "".join(part for text in (*TEXTS, PROBE) for part, _ in whole.pre_tokenize_str(text))
        merges = sorted(set(itertools.pairwise(data)), key=lambda pair: (not pair[1].isupper(), pair))
        tokens = ["<|end|>", *sorted(letters), *("".join(pair) for pair in merges)]
        rules["model"] |= {"vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges}
        fast = FAST(tokenizer_object=Tokenizer.from_str(json.dumps(rules)), eos_token="<|end|>")
        written(fast, tmp_path / "m.gguf")
        with LlamaCpp(tmp_path / "m.gguf") as program:
            for text in (*TEXTS, PROBE):
                assert program.tokens(text) == fast(text, add_special_tokens=False)["input_ids"]
            found[split] = program.tokens(PROBE)
    alike = [names for names in itertools.combinations(SPLITS, 2) if found[names[0]] == found[names[1]]]
    assert not alike


def written(tokenizer: Any, path: Path, **choices: Any) -> LoadedModel:
    """A file with a tokenizer, and the model that it holds."""
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, **choices}
    loaded = made(transformers.LlamaConfig(**SIZES | sizes))
    loaded = LoadedModel(loaded.model, tokenizer, loaded.identity, loaded.name)
    levels = Blocks(loaded, ["Q8_0"], "layers").levels
    write_gguf(path, loaded, levels, [0] * len(levels.units))
    return compressed(loaded, levels, [0] * len(levels.units))


def test_an_unknown_way_of_cutting_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cuts text \(Split and ByteLevel\) is not known: convert the model"):
        written(byte_level_tokenizer("of its own"), tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"cuts text \(Sequence\) is not known"):
        _splitting({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}})


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GemmaTokenizer", "begins", "begins and ends", "neither"])
def test_a_text_begins_and_ends_in_llama_cpp_as_the_tokenizer_has_it(kind: str, tmp_path: Path) -> None:
    """Read from its folder, a tokenizer says that it adds nothing, whatever it does."""
    if kind.endswith("Tokenizer"):
        special = ["<unk>", "<s>", "</s>"] if kind == "LlamaTokenizer" else ["<pad>", "<eos>", "<bos>", "<unk>"]
        tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
        made_here = getattr(transformers, kind)
        fast: Any = made_here(vocab={t: i for i, t in enumerate([*tokens, "<mask>"])}, merges=[], add_bos_token=True)
    else:
        fast = byte_level_tokenizer("llama-bpe")
        fast.add_special_tokens({"bos_token": "<|begin|>"})
        around = {"begins": "<|begin|> $A", "begins and ends": "<|begin|> $A <|end|>", "neither": "$A"}[kind]
        numbers = [("<|begin|>", fast.bos_token_id), ("<|end|>", fast.eos_token_id)]
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=numbers)
    fast.save_pretrained(tmp_path / "tokenizer")
    again: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    model = written(again, tmp_path / "m.gguf")
    expected = again("hi")["input_ids"]
    assert (expected[0] == again.bos_token_id) == (kind != "neither")
    with LlamaCpp(tmp_path / "m.gguf") as program:
        assert program.tokens("hi", special=True) == expected
        assert program.tokens("hi") == again("hi", add_special_tokens=False)["input_ids"]
    assert difference(tmp_path / "m.gguf", model) < 1e-2
    if kind == "begins":
        again.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        with pytest.raises(ModelError, match="llama.cpp begins and ends a text with the tokens"):
            difference(tmp_path / "m.gguf", model)
        assert difference(tmp_path / "m.gguf", model, special=False) < 1e-2


def test_what_a_tokenizer_and_a_configuration_say_beside_is_in_the_file(tmp_path: Path) -> None:
    fast = byte_level_tokenizer("qwen2")
    fast.add_special_tokens({"bos_token": "<|begin|>"})
    for templates, named in (("{{ a }}", {}), ({"default": "{{ a }}", "tool_use": "{{ b }}"}, {"tool_use": "{{ b }}"})):
        fast.chat_template = templates
        model = written(fast, tmp_path / "m.gguf", max_position_embeddings=96)
        fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
        assert fields["tokenizer.chat_template"] == "{{ a }}"
        assert {n.rpartition(".")[2]: t for n, t in fields.items() if ".chat_template." in n} == named
        assert fields["tokenizer.ggml.bos_token_id"] == fast.convert_tokens_to_ids("<|begin|>")
        assert fields["tokenizer.ggml.eos_token_id"] == fast.convert_tokens_to_ids("<|end|>")
        assert fields["llama.context_length"] == 96
    named_so = LoadedModel(model.model, fast, model.identity, "/home/me/models/tiny")
    write_gguf(tmp_path / "n.gguf", named_so, Blocks(model, ["Q8_0"], "layers").levels, [0] * 7)
    assert gguf.GGUFReader(tmp_path / "n.gguf").fields["general.name"].contents() == "tiny"
