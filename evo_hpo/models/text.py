"""Calibration and held-out text as fixed-length token sequences: seeded, disjoint, tokenized once."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from evo_hpo.errors import TextError
from evo_hpo.models.corpora import Split, read_documents
from evo_hpo.models.loading import cache_folder

__all__ = ["load_tokens", "sample_from_model", "token_stream"]


def load_tokens(
    spec: str,
    tokenizer: Any,
    sequence_length: int,
    tokens: int,
    seed: int = 0,
    split: Split = "calibration",
    model: nn.Module | None = None,
) -> torch.Tensor:
    """Draw `tokens` tokens (rounded up to whole sequences) of the text named by `spec`.

    Args:
        spec: "pydoc" (the text of Python's own help), "wikitext2", "c4", "fineweb_edu", another hub data set as
            "name", "name:config" or "name:config:column", a file or folder of .txt, .md, .jsonl or .parquet, or
            "self" (sampled from `model`: no data needed).
        sequence_length: tokens a sequence; sequences never overlap.
        seed: order of the sequences. More tokens with the same seed begin with the same sequences.
        split: "calibration" and "held_out" come from different documents.

    Returns:
        int64 tensor, sequences x sequence_length.

    Raises:
        TextError: the text is missing or holds fewer tokens than asked for.
    """
    if sequence_length < 1 or tokens < 1:
        raise TextError(f"sequence_length={sequence_length}, tokens={tokens}: both must be at least 1")
    wanted = -(-tokens // sequence_length)
    if spec == "self":
        return _sampled(model, tokenizer, sequence_length, wanted, seed, split)
    limit = 4 * wanted * sequence_length if spec not in ("pydoc",) and not Path(spec).exists() else None
    stream = token_stream(spec, tokenizer, split, limit)
    available = len(stream) // sequence_length
    if available < wanted:
        raise TextError(
            f"{spec!r} ({split}) holds {available} sequences of {sequence_length} tokens, {wanted} were asked for:"
            f" ask for at most {available * sequence_length} tokens or name a longer text"
        )
    order = np.random.default_rng([seed, sequence_length]).permutation(available)[:wanted]
    sequences = stream[: available * sequence_length].reshape(available, sequence_length)[order]
    return torch.from_numpy(sequences.astype(np.int64))


def token_stream(spec: str, tokenizer: Any, split: Split, limit: int | None = None) -> npt.NDArray[np.int32]:
    """All tokens of one split as one stream (int32), documents separated by the end-of-text token; cached on disk.

    Args:
        limit: stop after about this many tokens (large hub data sets); None reads everything.
    """
    documents = read_documents(spec, split, None if limit is None else 8 * limit)
    digest = hashlib.sha256(f"{_tokenizer_key(tokenizer)}:{split}".encode())
    for document in documents:
        digest.update(document.encode())
        digest.update(b"\0")
    path = cache_folder() / "tokens" / f"{digest.hexdigest()[:32]}.npy"
    if path.is_file():
        return np.asarray(np.load(path, mmap_mode="r"))
    stream = _tokenize(documents, tokenizer)
    _write(path, stream)
    return stream


def sample_from_model(
    model: nn.Module, sequences: int, sequence_length: int, seed: int, batch: int = 16, start: int | None = None
) -> torch.Tensor:
    """Text without data: sequences sampled from the model itself at temperature 1, from its begin-of-text token.

    Returns:
        int64 tensor, sequences x sequence_length.
    """
    config: Any = model.config
    first = start if start is not None else getattr(config, "bos_token_id", None)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for begin in range(0, sequences, batch):
        count = min(batch, sequences - begin)
        rows.append(_sample_batch(model, count, sequence_length, 0 if first is None else int(first), generator, device))
    return torch.cat(rows)


@torch.inference_mode()
def _sample_batch(
    model: nn.Module, count: int, length: int, first: int, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    ids = torch.full((count, 1), first, dtype=torch.int64)
    cache, current = None, ids.to(device)
    for _ in range(length):
        output = model(input_ids=current, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = torch.softmax(output.logits[:, -1].float(), dim=-1).cpu()
        chosen = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat([ids, chosen], dim=1)
        current = chosen.to(device)
    return ids[:, 1:]


def _sampled(
    model: nn.Module | None, tokenizer: Any, length: int, sequences: int, seed: int, split: Split
) -> torch.Tensor:
    if model is None:
        raise TextError("the text 'self' is sampled from the model: pass model=")
    start = getattr(tokenizer, "bos_token_id", None)
    return sample_from_model(model, sequences, length, 2 * seed + (split == "held_out"), start=start)


def _tokenize(documents: list[str], tokenizer: Any) -> npt.NDArray[np.int32]:
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    separator = getattr(tokenizer, "eos_token_id", None)
    end = [] if separator is None else [separator]
    return np.concatenate([np.asarray([*ids, *end], dtype=np.int32) for ids in encoded])


def _tokenizer_key(tokenizer: Any) -> str:
    probe = tokenizer("The quick brown fox; def f(x):\n    return 3.14", add_special_tokens=False)["input_ids"]
    return f"{type(tokenizer).__name__}:{len(tokenizer)}:{probe}"


def _write(path: Path, stream: npt.NDArray[np.int32]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
        np.save(file, stream)
    os.replace(file.name, path)
