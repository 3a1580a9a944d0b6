"""What a search needs of a device's memory, from the model's configuration alone: nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from evo_hpo.errors import ModelError
from evo_hpo.levels.packing import AT_A_TIME
from evo_hpo.models.experts import unfuse_experts
from evo_hpo.models.loading import resolve_folder
from evo_hpo.models.paths import user_path
from evo_hpo.models.structure import decoder_blocks, linear_modules
from evo_hpo.scoring.tuning import COMPILED_TOKENS, GPU_TOKENS

TYPICAL: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Shapes of Llama 3.2 1B, Llama 3.1 8B and 70B."""

SPARSE = ("sparsegpt", "magnitude", "wanda")
GROUP = 16  # candidates whose final hidden states wait for one pass over the logits
FLASH = 2  # copies of a block's attention inputs that a pass holds beside its hidden states
PROCESS = 400_000_000
"""Python, torch and transformers in a process of a CPU, measured; of a GPU's memory nothing is counted for them."""
HOLES = 32_000_000
"""What the C library keeps of freed memory between what is in use, measured."""


def configuration(name: str) -> Any:
    """The configuration of a folder (its config.json is enough), a hub id, or a name in :data:`TYPICAL`.

    Raises:
        ModelError: nothing is found.
    """
    from transformers import AutoConfig, LlamaConfig

    if name in TYPICAL:
        common = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
        return LlamaConfig(**{**common, **TYPICAL[name]})
    path = user_path(name)
    return AutoConfig.from_pretrained(path if (path / "config.json").is_file() else resolve_folder(name))


def empty_model(config: Any) -> nn.Module:
    """The model of a configuration of transformers, without memory.

    Raises:
        ModelError: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model: nn.Module = make.from_config(config)
    except Exception as error:
        raise ModelError(f"transformers cannot build this configuration: {str(error).splitlines()[0]}") from error
    return model


@dataclass(frozen=True)
class ModelShape:
    """Sizes that decide memory.

    Attributes:
        parameters: all of them; ``shared`` weights (tied heads) counted once.
        linear: weights of the searched layers; ``largest``: of the largest of them.
        blocks, hidden, widest, vocabulary: decoder blocks, width of the stream, of the widest layer, entries.
        key_values: numbers that a token adds to the key-value cache, all blocks together; ``windowed``: of them, those
            in blocks that attend to the last ``window`` tokens only.
    """

    parameters: int
    linear: int
    largest: int
    blocks: int
    hidden: int
    widest: int
    vocabulary: int
    key_values: int
    windowed: int = 0
    window: int = 0

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Of a configuration of transformers; the model is made without memory.

        Raises:
            ModelError: transformers cannot build it, or it has no decoder blocks.
        """
        model = empty_model(config)
        weights = {id(p): p.numel() for p in model.parameters()}
        unfuse_experts(model)
        layers = linear_modules(model)
        sizes = [m.weight.numel() for m in layers.values()]  # type: ignore[operator]
        text = config.get_text_config()
        blocks = len(decoder_blocks(model))
        window, windows = _windows(text, blocks)
        return cls(
            sum(weights.values()),
            sum(sizes),
            max(sizes),
            blocks,
            text.hidden_size,
            max(max(m.weight.shape) for m in layers.values()),  # type: ignore[arg-type]
            text.vocab_size,
            len(windows) * _key_values(text),
            sum(windows) * _key_values(text),
            window,
        )

    def cached(self, tokens: int) -> int:
        """Numbers in the key-value cache of a sequence of so many tokens."""
        return (self.key_values - self.windowed) * tokens + self.windowed * min(tokens, self.window)


def _key_values(text: Any) -> int:
    """Numbers that a token adds to the cache of one block; where keys and values are made of a latent vector, that."""
    if latent := getattr(text, "kv_lora_rank", None):
        return int(latent + text.qk_rope_head_dim)
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None)
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        heads = 1
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * (heads or text.num_attention_heads) * width)


def _windows(text: Any, blocks: int) -> tuple[int, list[bool]]:
    """Tokens of a window, and of each block with attention whether it attends within it."""
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None) or 0
    usual = "sliding_attention" if window and getattr(text, "use_sliding_window", True) else "full_attention"
    kinds = getattr(text, "layer_types", None) or [usual] * blocks
    kinds = [kind for kind in kinds if kind not in _NO_ATTENTION]
    return window, [bool(window) and kind.startswith(("sliding", "chunked")) for kind in kinds]


_NO_ATTENTION = ("linear_attention", "mamba", "recurrent", "conv", "moe", "mlp")
"""Blocks, as configurations call them, that keep no keys and values."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device (on a CPU: of the process, mapped files included), by what takes them.

    Attributes:
        weights: the uncompressed model.
        levels: every level of every unit, decoded ("resident") or as packed as on disk.
        decoding: where levels are packed: the assignment in place, decoded, and room to decode the largest layer.
        dense: what is kept of the uncompressed model, for calibration and held-out tokens.
        copies: of the searched layers and the head, arranged as a CPU multiplies them. Replicas share that of a weight
            that lies at one place for all of them: the head, and a resident level.
        kept: block inputs that candidates share.
        running: a pass: hidden states, the widest layer, a chunk of logits.
        process: on a CPU: the libraries, and freed memory.
    """

    weights: int
    levels: int
    decoding: int
    dense: int
    copies: int
    kept: int
    running: int
    process: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(size for _, size in self.rows())

    def rows(self) -> list[tuple[str, int]]:
        """What takes memory, and how many bytes."""
        return [
            ("model", self.weights),
            ("levels", self.levels + self.decoding + self.copies),
            ("kept of the uncompressed model", self.dense),
            ("block inputs", self.kept),
            ("a pass", self.running + self.process),
        ]


def footprint(
    shape: ModelShape,
    levels: Sequence[float],
    *,
    method: str = "gptq",
    memory: str = "resident",
    group_size: int = 128,
    number: int = 2,
    state_number: int | None = None,
    sequence_length: int = 2048,
    calibration_tokens: int = 524_288,
    held_out_tokens: int = 131_072,
    replicas: int = 1,
    on_cpu: bool = False,
    compiled: bool = False,
    state_bytes: int = 1 << 28,
    reference_bytes: int = 1 << 29,
    packed_bytes: int = 1 << 31,
) -> Footprint:
    """What one evaluator needs: at most, for levels that no candidate has had yet are not decoded.

    Args:
        levels: bits, or sparsities; dropped modules take nothing.
        memory: ``resident``: levels decoded; ``packed``: as on disk; ``streamed``: of a GPU, which has two blocks at a
            time, and levels of none; the rest waits in main memory, so on a CPU two decoded blocks of each core are
            all that it has beside it.
        number: bytes of a number in the compute dtype.
        state_number: of hidden states, where it is another one.
        replicas: passes at the same time (one a core; on a GPU one).
        on_cpu: one sequence in a pass, unless ``compiled``, and small chunks of logits, not 8192 tokens; the process is
            counted, and packed copies of 32-bit weights.
        compiled: on a CPU, in bfloat16: several sequences in a pass, and copies of the weights; not the compiler.
        state_bytes, reference_bytes, packed_bytes: the evaluator's own settings.
    """
    pass_tokens = max(sequence_length, (COMPILED_TOKENS if compiled else 0) if on_cpu else GPU_TOKENS)
    copying = on_cpu and memory != "streamed" and (compiled or number == 4)
    drops = method == "drop"
    sets = min(replicas, 1) if drops else replicas if memory == "packed" else min(replicas, len(levels))
    layers, head = (min(packed_bytes, count * number) for count in (shape.linear, shape.hidden * shape.vocabulary))
    chunk = (COMPILED_TOKENS if compiled else 512, 1024) if on_cpu else (2048, 16384)
    state_number = state_number or number
    state = pass_tokens * shape.hidden * state_number
    path = (shape.blocks - 1) * state
    decoded = 0 if drops else shape.linear * number * len(levels)
    packed = sum(_packed(shape.linear, level, method, group_size) for level in levels)
    logits = chunk[0] * min(chunk[1], shape.vocabulary) * 4
    at_a_time = min(shape.largest, AT_A_TIME) if on_cpu else shape.largest
    streamed, two_blocks = memory == "streamed", 2 * -(-shape.linear // shape.blocks)
    brought = streamed and not on_cpu
    there = shape.parameters - shape.linear + two_blocks if brought else shape.parameters
    in_place = 0 if brought else replicas * (two_blocks if streamed else shape.linear) * number
    return Footprint(
        weights=there * number,
        levels=decoded if memory == "resident" else 0 if brought else packed,
        decoding=0 if memory == "resident" or drops else in_place + at_a_time * (number + 2 * 4),
        dense=2 * shape.hidden * (calibration_tokens + held_out_tokens),
        copies=sets * layers + head if copying else 0,
        kept=replicas * min(state_bytes, path) + min(reference_bytes, 2 * path),
        running=replicas * ((2 + FLASH + GROUP) * state + 3 * pass_tokens * shape.widest * state_number + 3 * logits),
        process=PROCESS + HOLES if on_cpu else 0,
    )


def _packed(weights: int, level: float, method: str, group_size: int) -> int:
    """Bytes of the layers at one level, as the store keeps them."""
    if method == "drop":
        return 0
    if method in SPARSE:
        return int(weights * ((1 - level) * 2 + 1 / 8))
    if method == "ggml":
        return int(weights * level / 8)
    return int(weights * level / 8 + weights / group_size * 3)
