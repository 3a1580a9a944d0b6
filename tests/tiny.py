"""Tiny random models of several architectures, levels for them, and the plain way to compute losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

from evo_hpo.models.structure import droppable_modules, linear_modules, outer_matrices
from evo_hpo.space.compression_space import Assignment, Unit

VOCABULARY = 97
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_LLAMA: dict[str, Any] = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}

ARCHITECTURES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_LLAMA),
    "qwen2": lambda: transformers.Qwen2Config(**_LLAMA, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**_LLAMA, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **_LLAMA, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=5.0, sliding_window=4
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "opt": lambda: transformers.OPTConfig(**_COMMON, ffn_dim=48, word_embed_proj_dim=24, max_position_embeddings=64),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON, intermediate_size=48, max_position_embeddings=64),
    "granite": lambda: transformers.GraniteConfig(**_LLAMA, logits_scaling=3.0, residual_multiplier=0.7),
    "cohere": lambda: transformers.CohereConfig(**_LLAMA, logit_scale=0.25),
}


def random_model(config: transformers.PretrainedConfig, seed: int = 0, spread: float | None = None) -> nn.Module:
    """The same weights for the same seed; with ``spread``, matrices are normal with that standard deviation."""
    auto: Any = transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        model: nn.Module = auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if spread is not None and parameter.dim() == 2:
                    parameter.normal_(0, spread)
    return model.eval()


def tiny_model(name: str, seed: int = 0) -> nn.Module:
    """A model of the architecture with weights large enough that its predictions are far from uniform."""
    return random_model(ARCHITECTURES[name](), seed, spread=0.25)


def tiny_mixtral() -> nn.Module:
    """A mixture of three experts a block, which transformers stores as one parameter."""
    llama = _LLAMA | {"num_hidden_layers": 2, "intermediate_size": 24}
    return random_model(transformers.MixtralConfig(**llama, num_local_experts=3))


def tiny_tokens(sequences: int = 8, length: int = 12, seed: int = 0) -> Tensor:
    """Random token ids, sequences x length."""
    return torch.from_numpy(np.random.default_rng(seed).integers(1, VOCABULARY, size=(sequences, length)))


class RoundedLevels:
    """Every linear layer rounded to a grid of 2^bits steps; with ``outer``, embedding and head too."""

    def __init__(self, model: nn.Module, bits: Sequence[int] = (2, 4, 6), outer: bool = False) -> None:
        self.fingerprint = f"rounded {bits}"
        found = linear_modules(model) | (outer_matrices(model) if outer else {})
        modules = {name: _parameter(module).detach() for name, module in found.items()}
        self.units = [Unit(n, tuple(b * w.numel() for b in bits), size=w.numel()) for n, w in modules.items()]
        self._weights = {
            (u, k): {name: _round(weight, b)}
            for u, (name, weight) in enumerate(modules.items())
            for k, b in enumerate(bits)
        }

    def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
        return self._weights[unit, level]


class DropLevels:
    """Attention, MLP or whole blocks: level 0 drops, level 1 keeps."""

    def __init__(self, model: nn.Module, kinds: Sequence[str] = ("attention", "mlp")) -> None:
        self.fingerprint = f"drop {kinds}"
        found = {n: members for kind in kinds for n, members in droppable_modules(model, kind).items()}
        self.units = [Unit(name, (0, 1), members=members) for name, members in found.items()]

    def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
        return dict.fromkeys(self.units[unit].members) if level == 0 else {}


def _parameter(module: nn.Module) -> nn.Parameter:
    parameter = module.weight
    assert isinstance(parameter, nn.Parameter)
    return parameter


def _round(weight: Tensor, bits: int) -> Tensor:
    low, high = weight.min(), weight.max()
    step = (high - low) / (2**bits - 1)
    rounded: Tensor = ((weight - low) / step).round() * step + low
    return rounded


def plain_losses(
    make_model: Callable[[], nn.Module], levels: RoundedLevels, assignment: Assignment, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(dense || compressed) and cross-entropy of each position but the last, from full logits of a plain model."""
    dense, compressed = make_model(), make_model()
    modules = dict(compressed.named_modules())
    for unit, level in enumerate(assignment):
        for name, weight in levels.weights(unit, level).items():
            assert weight is not None
            _parameter(modules[name]).data = weight
    with torch.no_grad():
        log_p, log_q = (
            torch.log_softmax(m(input_ids=tokens).logits[:, :-1].float(), dim=-1) for m in (dense, compressed)
        )
    divergence: Tensor = (log_p.double().exp() * (log_p.double() - log_q.double())).sum(-1)
    entropy: Tensor = -log_q.gather(-1, tokens[:, 1:, None])[..., 0]
    return divergence, entropy


def random_assignments(count: int, units: int, levels: int, seed: int = 0) -> list[Assignment]:
    """Different assignments, several of which agree in their first units."""
    rng = np.random.default_rng(seed)
    parent = rng.integers(levels, size=units)
    found: dict[Assignment, None] = {}
    while len(found) < count:
        child = parent.copy()
        changed = rng.integers(units, size=2)
        child[changed] = rng.integers(levels, size=2)
        found[tuple(int(x) for x in child)] = None
    return list(found)


def save_tiny(folder: Path, config: transformers.PretrainedConfig | None = None, spread: float | None = None) -> Path:
    """A model with random weights (by default a two-block Llama) and a byte-level tokenizer, in a folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 10, trainer)
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    small = transformers.LlamaConfig(
        vocab_size=280,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model: Any = random_model(config or small, spread=spread)
    model.save_pretrained(folder)
    return folder
