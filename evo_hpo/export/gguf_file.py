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

from evo_hpo.errors import ModelError, PlanError
from evo_hpo.export.card import Card
from evo_hpo.export.folder import opened, place, task_of
from evo_hpo.export.gguf_check import difference, searched_divergence
from evo_hpo.export.gguf_header import architecture_of, copy_header, refuse_unlike, write_header
from evo_hpo.export.gguf_tensors import kept_blocks, tensors_of, type_lines
from evo_hpo.export.llama_cpp import forget
from evo_hpo.files import made_whole, write_whole
from evo_hpo.levels.ggml import dequantize, ggml_type, library, quantize
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.models.loading import LoadedModel, one_line, source_gguf
from evo_hpo.models.paths import place_for, user_path


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        profile: what it was made from.
        bytes: of the file.
        checked: what llama.cpp showed when it read the file.
    """

    profile: dict[str, Any]
    bytes: int
    checked: str


def export_gguf(
    profile: Path,
    output: Path,
    *,
    template: Path | None = None,
    embedding: str = "",
    head: str = "",
    check: bool = True,
) -> Exported:
    """Write a profile's model as a GGUF file; beside it a model card, and its tensors' types for ``llama-quantize``.

    Args:
        profile: a file under a comparison's ``profiles/``.
        output: file to make; must not exist.
        template: another GGUF file of the model (F16, say), whose header, tokenizer and tensors outside the search are
            taken over; default: the one that the model was read from, or one written here.
        embedding, head: ggml type of the token embedding and of the output matrix; default: as in the template, or F16.
        check: where neither is given, compare llama.cpp's KL on the held-out text with the profile's; it reads a short
            text in any case.

    Raises:
        PlanError: not a profile of a language model, the file or one of those beside it exists, or is of another model:
            as for a folder.
        ModelError: no GGUF file can be written of this model, or llama.cpp reads it differently; nothing is left then.
    """
    asked = {"token_embd.weight": embedding, "output.weight": head}
    types = {name: ggml_type(kind) for name, kind in asked.items() if kind}
    library()
    with place_for(output) as path:
        beside = (path, card_file(path), type_file(path))
        if there := [file for file in beside if user_path(file).exists()]:
            raise PlanError(f"{there[0]} exists already: name another file to make")
        data, loaded, levels, assignment = opened(profile, path, "float32")
        source = user_path(template) if template else source_gguf(loaded.name)
        try:
            size = write_gguf(path, loaded, levels, assignment, template=source, types=types)
            place(loaded.model, levels, assignment)
            for name, kind in types.items():
                _round(loaded.model, name, kind)
            apart = difference(path, loaded, special=source is None)
            checked = f"llama.cpp reads it, {apart:.2g} nats a token from the model here on a short text"
            if check and not types:
                checked = f"{checked}; {searched_divergence(path, data, task_of(data))}"
            weights = sum({id(p): p.numel() for p in loaded.model.parameters()}.values())
            card = Card(data, profile, levels, assignment, "GGUF", "ggml types", size, weights, checked)
            write_whole(card_file(path), card.text())
        except BaseException:
            for made in beside:
                with suppress(OSError):
                    made.unlink()
            raise
    return Exported(data, size, checked)


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
    blocks = len(kept_blocks(model, levels, assignment))
    refuse_unlike(config, blocks)
    given = _read(template) if template else None
    if given and (found := given.fields["general.architecture"].contents()) != architecture.name:
        raise ModelError(f"the template is of architecture {found!r}, the model's is {architecture.name!r}")
    tensors = tensors_of(model, levels, assignment, architecture, given, types)
    if unknown := set(types or {}) - {tensor.name for tensor in tensors}:
        raise ModelError(f"the model has no {unknown.pop()!r}: its head is its embedding, choose the embedding's type")
    if twice := [tensor.name for tensor in tensors if tensor.searched and tensor.name in (types or {})]:
        raise ModelError(f"the type of {twice[0]!r} was searched: leave out --embedding and --head")
    writer = GGUFWriter(None, architecture.name)
    if given:
        copy_header(writer, given, blocks)
    else:
        write_header(writer, config, loaded.tokenizer, blocks, loaded.name)
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
    forget(output)  # it would be decoded more slowly from the pages that it was written to
    write_whole(type_file(output), "".join(type_lines(tensors)))
    return size


def _read(template: Path) -> GGUFReader:
    try:
        return GGUFReader(template)
    except Exception as error:  # whatever a damaged file makes the package raise
        raise ModelError(f"cannot read the GGUF file {str(template)!r}: {one_line(error)}") from error


def card_file(output: Path) -> Path:
    """Where the model card of a GGUF file is written."""
    return output.with_name(f"{output.name}.md")


def type_file(output: Path) -> Path:
    """Where the types of a GGUF file's tensors are written for ``llama-quantize``."""
    return output.with_name(f"{output.name}.tensor-types.txt")


def _padded(size: int) -> int:
    return math.ceil(size / 32) * 32


def _config(model: nn.Module) -> Any:
    return model.config
