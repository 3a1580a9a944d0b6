"""What llama.cpp makes of a GGUF file that was written, against the model here and what the search found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evo_hpo.errors import ModelError
from evo_hpo.export.figures import POSITIONS
from evo_hpo.export.llama_cpp import LlamaCpp
from evo_hpo.models.loading import LoadedModel, load_model
from evo_hpo.scoring.task import LanguageModelTask

PROBE = (
    "The first 1024 bytes aren't read: def size(path):\n    return path.stat().st_size  # naïve, 12,5 % of 3 °C\n"
    "I'M sure THAT getElementById isn't camelCase, nor JSONParser or iPhone 123456789/12;\r\n\n\n\tend...\n\n  \n\n"
)
"""What is read by both programs: words, capitals, digits, code, ends of lines, other letters."""

_FARTHEST = 0.1
"""Divergence (nats a token) of llama.cpp's outputs from ours above which a file is wrong: its rounding is far below."""


@torch.inference_mode()
def difference(path: Path, loaded: LoadedModel, *, special: bool = True) -> float:
    """Mean KL (nats a token) from a model's outputs to those of llama.cpp with this file, on a short text.

    Args:
        special: the tokens that begin and end a text must be the same too; those of a template are its own.

    Raises:
        ModelError: llama.cpp cannot load the file, cuts text into other tokens, or computes something else.
    """
    with LlamaCpp(path, threads=torch.get_num_threads()) as program:
        ids = [7 * i % program.vocabulary for i in range(64)]
        if loaded.tokenizer is not None:
            ids = loaded.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
            if (theirs := program.tokens(PROBE)) != ids:
                at = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), len(theirs))
                raise ModelError(
                    f"llama.cpp cuts text into other tokens (from the {at + 1}th on): convert the model to F16 with"
                    " llama.cpp's convert_hf_to_gguf.py and give that file as --template"
                )
            whole = loaded.tokenizer(PROBE)["input_ids"]
            if special and (theirs := program.tokens(PROBE, special=True)) != whole:
                raise ModelError(
                    f"llama.cpp begins and ends a text with the tokens {theirs[0]} and {theirs[-1]}, the model's"
                    f" tokenizer with {whole[0]} and {whole[-1]}: convert the model to F16 with llama.cpp's"
                    " convert_hf_to_gguf.py and give that file as --template"
                )
        found = float(_divergences(loaded.model, program, ids).mean())
    if not found < _FARTHEST:
        raise ModelError(
            f"llama.cpp computes other outputs from {path} (KL {found:.3g} nats a token): not a file of this model"
        )
    return found


@torch.inference_mode()
def divergence(path: Path, original: nn.Module, text: Tensor) -> float:
    """Mean KL (nats a token) from a model to llama.cpp with this file, on sequences x length."""
    with LlamaCpp(path, context=text.shape[1], threads=torch.get_num_threads()) as program:
        return float(torch.cat([_divergences(original, program, ids.tolist())[:-1] for ids in text]).mean())


def searched_divergence(path: Path, data: Mapping[str, Any], task: LanguageModelTask) -> str:
    """Compares llama.cpp's KL from the uncompressed model, on the first held-out text, with what the search found.

    Raises:
        ModelError: they differ by more than their arithmetic explains.
    """
    original = load_model(task.model, torch.float32)
    text = next(iter(task.texts.judged(original.tokenizer, original.model).values()))
    found, wanted = divergence(path, original.model, text), float(data["held_out"]["loss"])
    recorded = ((data.get("fingerprint") or {}).get("identity") or {}).get("dtype")
    least = 2e-3 if task.arithmetic and recorded == "float32" else 1e-2
    if not abs(found - wanted) <= 0.05 * abs(wanted) + least:
        raise ModelError(
            f"llama.cpp has a KL of {found:.6g} nats a token on the held-out text, the search found {wanted:.6g}:"
            " model, text or libraries are not what they were; --no-check writes the file all the same"
        )
    return f"its KL is {found:.5g} nats a token on the held-out text, the search found {wanted:.5g}"


def _divergences(model: nn.Module, program: LlamaCpp, ids: list[int]) -> Tensor:
    """Of each position of one sequence."""
    theirs = torch.from_numpy(program.logits(ids))
    ours = model(input_ids=torch.tensor([ids])).logits[0]
    found = []
    for start in range(0, len(ids), POSITIONS):
        part = slice(start, start + POSITIONS)
        p, q = torch.log_softmax(ours[part].float(), -1), torch.log_softmax(theirs[part, : ours.shape[1]], -1)
        found.append((p.exp() * (p - q)).double().sum(-1))
    return torch.cat(found)
