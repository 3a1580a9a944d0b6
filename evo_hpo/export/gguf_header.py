"""What a GGUF file says beside its tensors: of another GGUF file, or written from a configuration and a tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFReader, GGUFValueType, GGUFWriter, TokenType

from evo_hpo.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp wants a model.

    Attributes:
        name: llama.cpp's.
        paired: rows of q and k stand in pairs that are rotated together.
        shifted: norms hold what is multiplied by, where transformers holds one less.
    """

    name: str
    paired: bool = False
    shifted: bool = False


ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "mixtral"), Architecture("llama", paired=True)),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", shifted=True),
    "gemma2": Architecture("gemma2", shifted=True),
}
"""By transformers' `model_type`."""


def architecture_of(config: Any) -> Architecture:
    """The architecture of a model with this configuration.

    Raises:
        ModelError: it is not known how llama.cpp wants it.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ModelError(f"no GGUF file for model_type {config.model_type!r}: known are {', '.join(ARCHITECTURES)}")
    return found


_OF_THE_FILE = ("general.architecture", "general.file_type", "general.alignment")


def copy_header(writer: GGUFWriter, template: GGUFReader, blocks: int) -> None:
    """All that another file says; of so many blocks."""
    for name, field in template.fields.items():
        kind = field.types[0]
        if name.startswith(("GGUF.", "split.")) or name in _OF_THE_FILE:
            continue
        value = blocks if name.endswith(".block_count") else field.contents()
        writer.add_key_value(name, value, kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)


def refuse_unlike(config: Any, blocks: int) -> None:
    """Raises ModelError where llama.cpp computes an architecture in one way only, and the model does in another.

    Args:
        blocks: that the file will have.
    """
    if config.model_type != "gemma2":
        return
    wanted = config.hidden_size // config.num_attention_heads if blocks == _GEMMA2_27B else config.head_dim
    if config.query_pre_attn_scalar != wanted:
        raise ModelError(
            f"query_pre_attn_scalar={config.query_pre_attn_scalar} is not what llama.cpp divides by in a gemma2 of"
            f" {blocks} blocks, {wanted}: no GGUF file can say it, export a folder"
        )
    turns = [("sliding_attention", "full_attention")[number % 2] for number in range(config.num_hidden_layers)]
    if list(config.layer_types) != turns:
        raise ModelError(
            "llama.cpp has windows in every other block of a gemma2, the first one included; layer_types says"
            " otherwise, and no GGUF file can: export a folder"
        )


_GEMMA2_27B = 46
"""Blocks by which llama.cpp knows the model that divides by its width a head."""


def write_header(writer: GGUFWriter, config: Any, tokenizer: Any, blocks: int, model: str) -> None:
    """What a configuration and a tokenizer say, in llama.cpp's words.

    Args:
        blocks: that the file has.
        model: hub id or folder; its last part is the file's name of it.

    Raises:
        ModelError: something of them is not known here; the message says what to do.
    """
    heads, width = config.num_attention_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or width // heads
    writer.add_name(Path(model).name or config.model_type)
    writer.add_block_count(blocks)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(_rope(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if experts := getattr(config, "num_local_experts", 0):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    elif getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ModelError(f"sliding_window={config.sliding_window} of {config.model_type!r} is not written: {_TEMPLATE}")
    _write_tokenizer(writer, config, tokenizer)


_TEMPLATE = "convert the model to F16 with llama.cpp's convert_hf_to_gguf.py and give that file as --template"


def _rope(config: Any) -> float:
    given: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if given.get("rope_type", "default") != "default":
        raise ModelError(f"rope_type {given['rope_type']!r} is not written: {_TEMPLATE}")
    return float(given.get("rope_theta", 10000.0))


# ---------------------------------------------------------------------- tokenizers


def _write_tokenizer(writer: GGUFWriter, config: Any, tokenizer: Any) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    rules = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    if rules["model"].get("type") != "BPE":
        raise ModelError(f"a tokenizer of type {rules['model'].get('type')!r} is not written: {_TEMPLATE}")
    ids: dict[str, int] = dict(rules["model"]["vocab"])
    added = {token["content"]: token for token in rules.get("added_tokens", ())}
    ids |= {content: token["id"] for content, token in added.items()}
    by_id = {number: token for token, number in ids.items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(config.vocab_size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in rules["model"]["merges"]]
    pieces = bool(rules["model"].get("byte_fallback"))
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else _splitting(rules))
    writer.add_token_list(tokens)
    writer.add_token_types([_kind(token, added, number in by_id) for number, token in enumerate(tokens)])
    if pieces:
        rank = {merge.replace(" ", ""): -float(number) for number, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([rank.get(token, 0.0 if token in added else -1e6) for token in tokens])
        writer.add_add_space_prefix(_prefixed(rules))
    else:
        writer.add_token_merges(merges)
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            add(number)
    ids_of_text = tokenizer("x")["input_ids"]  # what a tokenizer says of itself need not be what it does
    writer.add_add_bos_token(ids_of_text[:1] == [getattr(tokenizer, "bos_token_id", None)])
    writer.add_add_eos_token(ids_of_text[-1:] == [getattr(tokenizer, "eos_token_id", None)])
    if templates := getattr(tokenizer, "chat_template", None):
        several = isinstance(templates, Mapping)
        named = [{"name": name, "template": text} for name, text in templates.items()] if several else templates
        writer.add_chat_template(named)


def _kind(token: str, added: Mapping[str, Mapping[str, Any]], known: bool) -> TokenType:
    if not known:
        return TokenType.UNUSED
    if token in added:
        return TokenType.CONTROL if added[token]["special"] else TokenType.USER_DEFINED
    return TokenType.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else TokenType.NORMAL


def _prefixed(rules: Mapping[str, Any]) -> bool:
    return any(
        word in json.dumps([rules.get("normalizer"), rules.get("pre_tokenizer")]) for word in ("Prepend", "first")
    )


_LETTERS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    _WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES: "qwen2",
    _WORDS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES: "llama-bpe",
    _LETTERS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES: "tekken",
}
"""Expressions that byte-level tokenizers cut text by, and llama.cpp's name of each."""


def _splitting(rules: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer cuts text before it merges.

    Raises:
        ModelError: it has none that is known here.
    """
    before = rules.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers") or [before]
    kinds = [step.get("type") for step in steps]
    whole = kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space")
    if whole and kinds == ["ByteLevel"] and steps[-1].get("use_regex"):
        return "gpt-2"
    if whole and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[-1].get("use_regex"):
        return "smollm"
    if whole and kinds == ["Split", "ByteLevel"] and not steps[-1].get("use_regex"):
        given = steps[0]["pattern"].get("Regex", "")
        if given in SPLITS and steps[0]["behavior"] == "Isolated" and not steps[0].get("invert"):
            return SPLITS[given]
    raise ModelError(f"how this tokenizer cuts text ({' and '.join(map(str, kinds))}) is not known: {_TEMPLATE}")
