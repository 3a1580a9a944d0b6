"""Calibration and held-out text as fixed-length token sequences: seeded, mixed, disjoint, tokenized once."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from evo_hpo.errors import ModelError, TextError
from evo_hpo.files import made_whole
from evo_hpo.models.corpora import WHOLE, Spec, Split, is_local, is_path, read_documents, same_text, shares_of
from evo_hpo.models.identity import digest, tokenizer_identity
from evo_hpo.models.paths import cache_folder, made_folder

_log = logging.getLogger("evo_hpo")


def load_tokens(
    spec: Spec,
    tokenizer: Any,
    sequence_length: int,
    tokens: int,
    seed: int = 0,
    split: Split = "calibration",
    model: nn.Module | None = None,
    apart_from: Collection[str] = (),
    drawn: int = 0,
) -> torch.Tensor:
    """Draw `tokens` tokens (rounded up to whole sequences) of the text named by `spec`.

    Args:
        spec: "pydoc" (the text of Python's own help), "encyclopedia" (articles on units and quantities that a package
            carries), "wikitext2", "c4", "fineweb_edu", another hub data set as "name", "name:config" or
            "name:config:column", a file or folder of .txt, .md, .jsonl or .parquet (a third of it is the held-out
            split; all of it is either split with "whole:" before its name), "self" (sampled from `model`), or several
            with their shares of a mix, as {"pydoc": 3, "wikitext2": 1}: whatever number of sequences is drawn holds
            them in these shares, to one sequence.
        sequence_length: tokens a sequence; sequences never overlap.
        seed: order of the sequences. More tokens with the same seed begin with the same sequences where the whole text
            is here; a hub data set is read in part, and "self" is sampled anew.
        split: "calibration" and "held_out" come from different documents.
        apart_from: texts whose calibration split may hold nothing of what is drawn here: sequences that stand in it,
            under whatever name, are left out; of a local text also those of its own other split.
        drawn: tokens that were drawn of each of those at most, for those that are read in part.

    Returns:
        int64 tensor, sequences x sequence_length.

    Raises:
        TextError: the text is missing or holds fewer tokens than asked for, or a share gives a text no sequence.
    """
    if sequence_length < 2 or tokens < 1:
        raise TextError(
            f"sequence_length={sequence_length}, tokens={tokens}: both must be at least 1, and the first token of a"
            " sequence is predicted by nothing: give sequences of 2 or more"
        )
    wanted = -(-tokens // sequence_length)
    if model is not None:
        refuse_too_long(model, sequence_length)
    parts = shares_of(spec)
    if len(parts) > 1:
        chosen = _mixed(parts, wanted)
        more = (seed, split, model, apart_from, drawn)
        drawers = {
            name: iter(load_tokens(name, tokenizer, sequence_length, chosen.count(name) * sequence_length, *more))
            for name in parts
        }
        return torch.stack([next(drawers[name]) for name in chosen])
    (spec,) = parts
    if spec == "self":
        return _sampled(model, tokenizer, sequence_length, wanted, seed, split)
    limit = None if is_local(spec) else 4 * wanted * sequence_length
    stream = token_stream(spec, tokenizer, split, limit)
    rows = stream[: len(stream) // sequence_length * sequence_length].reshape(-1, sequence_length)
    whole = len(rows)
    for other in sorted({o for o in apart_from if o != "self" and not _same(o, spec)}):
        read = None if is_local(other) else 4 * max(wanted * sequence_length, drawn)
        known = token_stream(other, tokenizer, "calibration", read)
        rows = rows[~_stand_in(rows, known)]
    leaked = whole - len(rows)
    order = np.random.default_rng([seed, sequence_length]).permutation(len(rows))
    if is_path(spec) and any(_same(other, spec) for other in apart_from):
        order, near = _apart(rows, order, wanted, token_stream(spec, tokenizer, "calibration"))
        leaked += near
    available = len(order)
    apart = f" beside {leaked} that stand in the calibration text" if leaked else ""
    if available < wanted:
        raise TextError(
            f"{spec!r} ({split}) holds {available} sequences of {sequence_length} tokens{apart}, {wanted} were asked"
            f" for: {f'ask for at most {available * sequence_length} tokens or ' * bool(available)}name a longer text"
        )
    if leaked:
        _log.warning(
            "%r (%s): left out %d of %d sequences that stand in the calibration text", spec, split, leaked, whole
        )
    found = torch.from_numpy(rows[order[:wanted]].astype(np.int64))
    if model is not None:
        refuse_unknown(model, found)
    return found


def refuse_unknown(model: nn.Module, tokens: torch.Tensor) -> None:
    """Raises ModelError where the model does not know one of the tokens."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embedding, "num_embeddings", None)
    if size is not None and (largest := int(tokens.max())) >= size:
        raise ModelError(
            f"the tokenizer gives token {largest}, the model knows 0 to {size - 1}: give the model its own tokenizer"
        )


def _mixed(shares: Mapping[str, float], count: int) -> list[str]:
    """Which text each of so many sequences is of: always the one that is furthest behind its share.

    Raises:
        TextError: one of the texts gets none.
    """
    order: list[str] = []
    for position in range(1, count + 1):
        order.append(max(shares, key=lambda name: shares[name] * position - order.count(name)))
    for name, share in shares.items():
        if name not in order:
            raise TextError(
                f"a share of {share:.3g} gives {name!r} none of {count} sequences: ask for more tokens, or give it more"
            )
    return order


def _same(spec: str, other: str) -> bool:
    """Whether two names are of one text, whose splits share no document."""
    return not spec.startswith(WHOLE) and same_text(spec, other)


def _stand_in(rows: npt.NDArray[np.int32], stream: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which sequences share more than an eighth of their runs of 32 tokens with a stream, wherever they stand in it."""
    if not len(rows):
        return np.zeros(0, dtype=bool)
    run = min(32, rows.shape[1])
    wanted = _hashes(rows, run)
    found = np.zeros(wanted.shape, dtype=bool)
    for start in range(0, max(0, len(stream) - run + 1), 1 << 20):
        found |= np.isin(wanted, _hashes(np.asarray(stream[start : start + (1 << 20) + run - 1])[None], run))
    return np.asarray(found.mean(axis=1) > 1 / 8)


def _apart(
    rows: npt.NDArray[np.int32], order: npt.NDArray[np.int64], wanted: int, stream: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int64], int]:
    """The first of the rows in an order, `wanted` or more, that do not stand in a stream; how many others were met.

    Documents of one text can be all but equal; no more rows are looked at than are needed.
    """
    kept, met = order[:0], 0
    while len(kept) < wanted and met < len(order):
        part = order[met : met + max(wanted, met)]
        kept = np.concatenate([kept, part[~_stand_in(rows[part], stream)]])
        met += len(part)
    return kept, met - len(kept)


def _hashes(rows: npt.NDArray[np.int32], run: int) -> npt.NDArray[np.uint64]:
    """A hash of each run of so many tokens in each row."""
    total = np.zeros((len(rows), rows.shape[1] - run + 1), dtype=np.uint64)
    for offset in range(run):
        total = total * np.uint64(0x9E3779B97F4A7C15) + rows[:, offset : offset + total.shape[1]].astype(np.uint64) + 1
    return total


def refuse_too_long(model: nn.Module, length: int) -> None:
    """Raises ModelError where the model has no positions for sequences of this length."""
    config: Any = model.config
    known = getattr(config, "max_position_embeddings", None)
    if known is None or length <= known:
        return
    learned = any(
        isinstance(part, nn.Embedding) and re.search(r"pos|wpe", name) and part.num_embeddings <= known + 4
        for name, part in model.named_modules()
    )
    try:
        if not learned:  # rotary positions go on for ever, tables of them do not
            with torch.inference_mode():
                model(input_ids=torch.zeros(1, length, dtype=torch.int64, device=next(model.parameters()).device))
            return
        error = ""
    except (IndexError, RuntimeError) as caught:
        error = f" ({str(caught).splitlines()[0]})"
    raise ModelError(
        f"sequences of {length} tokens are longer than the {known} positions that the model has{error}:"
        f" set sequence_length to at most {known}"
    )


def token_stream(spec: str, tokenizer: Any, split: Split, limit: int | None = None) -> npt.NDArray[np.int32]:
    """All tokens of one split as one stream (int32), documents separated by the end-of-text token; cached on disk.

    Args:
        limit: stop after about this many tokens (large hub data sets); None reads everything.
    """
    documents = read_documents(spec, split, None if limit is None else 8 * limit)
    key = digest([tokenizer_identity(tokenizer), split, *documents])
    path = cache_folder() / "tokens" / f"{key}.npy"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError, EOFError):  # not there, or damaged
        return np.asarray(np.load(path, mmap_mode="r"))
    stream = _tokenize(documents, tokenizer)
    made_folder(path.parent)
    with made_whole(path) as growing, growing.open("wb") as file:
        np.save(file, stream)
        file.flush()
        os.fsync(file.fileno())
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
