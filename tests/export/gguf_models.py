"""Tiny models with rows of 256 that are written as GGUF files, and levels of ggml types for them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from evo_hpo.export.folder import place
from evo_hpo.export.llama_cpp import LlamaCpp
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.ggml import dequantize, quantize, row_bytes
from evo_hpo.levels.level_set import Choice, LevelSet, bundled
from evo_hpo.levels.manifest import LevelRecord, UnitRecord
from evo_hpo.levels.packing import GgmlBlocks
from evo_hpo.levels.quantizers import Ggml
from evo_hpo.levels.serving import STACKED
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import LoadedModel
from evo_hpo.models.structure import linear_modules, outer_matrices
from tests.tiny import VOCABULARY, random_model, tiny_tokens

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=64),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, head_dim=64),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=64, query_pre_attn_scalar=64),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=3, sliding_window=None),
}
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S")  # tables of these take seconds to make
FAST: Any = transformers.PreTrainedTokenizerFast
TOKENS = [int(token) for token in tiny_tokens(1, 32, seed=3)[0]]


def made(config: transformers.PretrainedConfig) -> LoadedModel:
    """A model whose norms, biases and matrices are all far from what they begin with."""
    model = random_model(config, spread=0.08)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand(parameter.shape, generator=generator) / 2)
    return LoadedModel.from_model(model)


def levels_of(loaded: LoadedModel, types: Sequence[str], folder: Path) -> LevelSet:
    build_store(loaded, folder, Ggml(types), tiny_tokens(4, 16), inputs="dense")
    return open_store(folder).levels


def distance(path: Path, model: nn.Module, tokens: Sequence[int] = TOKENS) -> float:
    """Relative squared difference of llama.cpp's logits from a model's, each position's mean taken off."""
    with LlamaCpp(path) as program:
        theirs = torch.from_numpy(program.logits(tokens))
    with torch.inference_mode():
        ours = model(input_ids=torch.tensor([list(tokens)])).logits[0]
    ours, theirs = (found - found.mean(-1, keepdim=True) for found in (ours, theirs))
    return float((ours - theirs).square().sum() / ours.square().sum())


def bits(levels: LevelSet, assignment: Sequence[int]) -> int:
    """What a budget counts."""
    chosen = (unit.costs[level] for unit, level in zip(levels.units, assignment, strict=True))
    return sum(cost for cost in chosen if isinstance(cost, int))


def compressed(loaded: LoadedModel, levels: LevelSet, assignment: Sequence[int]) -> LoadedModel:
    """The model with the weights of an assignment in place."""
    model = copy.deepcopy(loaded.model)
    place(model, levels, assignment)
    return LoadedModel(model, loaded.tokenizer, loaded.identity, loaded.name)


class Blocks:
    """Each unit has one level of one type, in turn."""

    def __init__(self, loaded: LoadedModel, types: Sequence[str], include: str = ".") -> None:
        self._made: dict[str, GgmlBlocks] = {}
        outer, layers = outer_matrices(loaded.model), linear_modules(loaded.model)
        names = [name for name in [*outer, *layers] if re.search(include, name)]
        wholes = list(dict.fromkeys(bundled(name, STACKED) for name in names))
        rows = []
        for name in names:
            weight = loaded.model.get_submodule(name).weight.detach()  # type: ignore[operator]
            kind = types[wholes.index(bundled(name, STACKED)) % len(types)]
            blocks = self._made[name] = GgmlBlocks(kind, blocks_of(weight, kind))
            level = LevelRecord(
                kind, blocks.storage_bits, weight.numel(), 1, blocks.storage_bits, 0.5, blocks.settings()
            )
            rows.append(
                (name, [[Choice(self, UnitRecord(name, (name,), weight.shape, weight.numel(), False, ()), level)]])
            )
        self.levels = LevelSet(rows, "bits")

    def unit_weights(self, unit: str, label: str) -> dict[str, torch.Tensor]:
        return {unit: self._made[unit].decode()}

    def unit_encoded(self, unit: str, label: str) -> GgmlBlocks:
        return self._made[unit]


def blocks_of(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A matrix quantized; of types that need large tables for that, random blocks of the same spread."""
    if kind not in SLOW:
        return quantize(weight, kind)
    rng = np.random.default_rng(weight.numel())
    shape = (len(weight), weight.shape[1] // 256, row_bytes(kind, 256))
    data = rng.integers(0, 256, shape, dtype=np.uint8)
    spread = dequantize(scaled(data, kind, 1.0), kind).std()
    return scaled(data, kind, float(weight.std() / spread))


def scaled(data: npt.NDArray[np.uint8], kind: str, scale: float) -> torch.Tensor:
    """Blocks (rows x blocks x bytes) with another scale, as rows x bytes."""
    half = int(np.float16(scale).view(np.uint16))
    if kind == "IQ1_M":  # four bits of the scale in each of the last four words
        words = data[..., -8:].view("<u2")
        words[...] = (words & 0x0FFF) | np.array([(half >> 4 * part & 0xF) << 12 for part in range(4)], dtype=np.uint16)
    else:
        data[..., :2].view("<u2")[...] = half
    return torch.from_numpy(data.reshape(len(data), -1).copy())


TEXTS = ["It isn't 1234 things; don't count 12,5 % of them.\n\n  def f(x):\n\treturn x", "naïve — 3 °C, 你好"]


def byte_level_tokenizer(split: str) -> Any:
    """A tokenizer that cuts text as the named family does, with merges of a few texts."""
    tokenizer = Tokenizer(models.BPE())
    pieces = {
        "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
    pieces["llama-bpe"] = pieces["qwen2"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    pieces["tekken"] = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    pieces["of its own"] = pieces["qwen2"].replace(r"|\p{N}|", r"|\p{N}{1,2}|")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split not in pieces)
    first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
    if split in pieces:
        first = [pre_tokenizers.Split(Regex(pieces[split]), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS * 3, "return things 1234 isn't don't count"], trainer)
    return FAST(tokenizer_object=tokenizer, eos_token="<|end|>")
