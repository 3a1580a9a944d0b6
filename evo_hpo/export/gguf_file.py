"""The winning profile as one GGUF file that llama.cpp runs (extra `gguf`), and has read before it is called done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import nn

from evo_hpo.errors import ModelError
from evo_hpo.export.card import Card
from evo_hpo.export.folder import opened, place
from evo_hpo.export.gguf_header import architecture_of, copy_header, write_header
from evo_hpo.export.gguf_tensors import kept_blocks, tensors_of, type_lines
from evo_hpo.export.llama_cpp import LlamaCpp
from evo_hpo.files import made_whole
from evo_hpo.levels.ggml import dequantize, ggml_type, library, quantize
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.models.loading import LoadedModel, one_line, source_gguf
from evo_hpo.models.paths import user_path

__all__ = ["Exported", "export_gguf", "write_gguf"]

PROBE = "The first 1024 bytes aren't read: def size(path):\n    return path.stat().st_size  # naïve, 12,5 % of 3 °C\n"
"""What is read by both programs: words, digits, code, other letters."""

_FARTHEST = 0.1
"""Divergence (nats a token) of llama.cpp's outputs from ours above which a file is wrong: its rounding is far below."""


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        profile: what it was made from.
        bytes: of the file.
        divergence: mean KL (nats a token) from the compressed model's outputs to llama.cpp's, on a short text.
    """

    profile: dict[str, Any]
    bytes: int
    divergence: float


def export_gguf(
    profile: Path, output: Path, *, template: Path | None = None, embedding: str = "", head: str = ""
) -> Exported:
    """Write a profile's model as a GGUF file; beside it a model card, and its tensors' types for ``llama-quantize``.

    Args:
        profile: a file under a comparison's ``profiles/``.
        output: file to make; must not exist.
        template: another GGUF file of the model (F16, say), whose header, tokenizer and tensors outside the search are
            taken over; default: the one that the model was read from, or one written here.
        embedding, head: ggml type of the token embedding and of the output matrix; default: as in the template, or F16.

    Raises:
        PlanError: not a profile of a language model, the file exists, or is of another model: as for a folder.
        ModelError: no GGUF file can be written of this model, or llama.cpp reads it differently; nothing is left then.
    """
    asked = {"token_embd.weight": embedding, "output.weight": head}
    types = {name: ggml_type(kind) for name, kind in asked.items() if kind}
    library()
    user_path(type_file(output))  # the longest name of those that are written
    data, loaded, levels, assignment = opened(profile, output, "float32")
    source = template or source_gguf(loaded.name)
    try:
        size = write_gguf(output, loaded, levels, assignment, template=source, types=types)
        place(loaded.model, levels, assignment)
        for name, kind in types.items():
            _round(loaded.model, name, kind)
        divergence = difference(output, loaded)
        checked = (
            f"llama.cpp reads it; its outputs are {divergence:.2g} nats a token from the model here, on a short text"
        )
        weights = sum({id(p): p.numel() for p in loaded.model.parameters()}.values())
        card = Card(data, profile, levels, assignment, "GGUF", "ggml types", size, weights, checked)
        output.with_name(f"{output.name}.md").write_text(card.text(), encoding="utf-8")
    except BaseException:
        for made in (output, type_file(output)):
            with suppress(OSError):
                made.unlink()
        raise
    return Exported(data, size, divergence)


def _round(model: Any, name: str, kind: str) -> None:
    """Gives the embedding or the head the values that its type can hold."""
    part = model.get_input_embeddings() if name == "token_embd.weight" else model.get_output_embeddings()
    with torch.no_grad():
        part.weight.copy_(dequantize(quantize(part.weight, kind), kind))


def write_gguf(
    output: Path,
    loaded: LoadedModel,
    levels: LevelSet,
    assignment: Sequence[int],
    *,
    template: Path | None = None,
    types: dict[str, str] | None = None,
) -> int:
    """Write the file, and its :func:`type_file` beside it; returns its bytes, known before they are written."""
    model, config = loaded.model, _config(loaded.model)
    architecture = architecture_of(config)
    given = _read(template) if template else None
    if given and (found := given.fields["general.architecture"].contents()) != architecture.name:
        raise ModelError(f"the template is of architecture {found!r}, the model's is {architecture.name!r}")
    tensors = tensors_of(model, levels, assignment, architecture, given, types)
    if unknown := set(types or {}) - {tensor.name for tensor in tensors}:
        raise ModelError(f"the model has no {unknown.pop()!r}: its head is its embedding, choose the embedding's type")
    if twice := [tensor.name for tensor in tensors if tensor.searched and tensor.name in (types or {})]:
        raise ModelError(f"the type of {twice[0]!r} was searched: leave out --embedding and --head")
    writer = GGUFWriter(None, architecture.name)
    blocks = len(kept_blocks(model, levels, assignment))
    if given:
        copy_header(writer, given, blocks)
    else:
        write_header(writer, config, loaded.tokenizer, blocks)
    for tensor in tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=GGMLQuantizationType[tensor.type])
    with made_whole(output) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.flush()
        header = temporary.stat().st_size + sum(24 + len(t.name) + 8 * t.data.ndim for t in tensors)
        size = _padded(header) + sum(_padded(tensor.data.nbytes) for tensor in tensors)
        writer.write_tensors_to_file()
        writer.close()
        if temporary.stat().st_size != size:
            raise ModelError(f"{output} has {temporary.stat().st_size} bytes, not {size}: the disk may be full")
    type_file(output).write_text("".join(type_lines(tensors)), encoding="utf-8")
    return size


def _read(template: Path) -> GGUFReader:
    try:
        return GGUFReader(template)
    except Exception as error:  # whatever a damaged file makes the package raise
        raise ModelError(f"cannot read the GGUF file {str(template)!r}: {one_line(error)}") from error


def type_file(output: Path) -> Path:
    """Where the types of a GGUF file's tensors are written for ``llama-quantize``."""
    return output.with_name(f"{output.name}.tensor-types.txt")


def difference(path: Path, loaded: LoadedModel) -> float:
    """Mean KL (nats a token) from a model's outputs to those of llama.cpp with this file, on a short text.

    Raises:
        ModelError: llama.cpp cannot load the file, cuts text into other tokens, or computes something else.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    with LlamaCpp(path, threads=torch.get_num_threads()) as program:
        ids = [7 * i % program.vocabulary for i in range(64)]
        if tokenizer is not None:
            ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
            if (theirs := program.tokens(PROBE)) != ids:
                at = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), len(theirs))
                raise ModelError(
                    f"llama.cpp cuts text into other tokens (from the {at + 1}th on): convert the model to F16 with"
                    " llama.cpp's convert_hf_to_gguf.py and give that file as --template"
                )
        found = torch.from_numpy(program.logits(ids))
    with torch.inference_mode():
        ours = model(input_ids=torch.tensor([ids])).logits[0].float()
    divergence = _divergence(ours, found)
    if not divergence < _FARTHEST:
        raise ModelError(
            f"llama.cpp computes other outputs from {path} (KL {divergence:.3g} nats a token): not a file of this model"
        )
    return divergence


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    p, q = torch.log_softmax(ours, -1), torch.log_softmax(theirs[:, : ours.shape[1]], -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _padded(size: int) -> int:
    return math.ceil(size / 32) * 32


def _config(model: nn.Module) -> Any:
    return model.config
