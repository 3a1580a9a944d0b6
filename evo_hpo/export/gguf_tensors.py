"""The tensors of a GGUF file: a model with the levels of an assignment, under llama.cpp's names and in its order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader
from torch import nn

from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.export.gguf_header import Architecture
from evo_hpo.levels.ggml import block_size, quantize, row_bytes, tensor_names, zeros_type
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.levels.packing import GgmlBlocks
from evo_hpo.models.structure import decoder_blocks

_BLOCK = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its type and its bytes, uint8, all but the last dimension as in the model."""

    name: str
    type: str
    data: npt.NDArray[np.uint8]
    searched: bool = False


def tensors_of(
    model: nn.Module,
    levels: LevelSet,
    assignment: Sequence[int],
    architecture: Architecture,
    template: GGUFReader | None = None,
    types: Mapping[str, str] | None = None,
) -> list[GgufTensor]:
    """Every tensor of a model at an assignment.

    What no unit holds is as it is in the template, bytes and all; without one, matrices are F16, the rest F32.

    Args:
        types: GGUF name, such as ``token_embd.weight`` -> the type it gets instead.

    Raises:
        ModelError: a tensor has no name in llama.cpp or another shape in the template; experts of a block differ.
    """
    chosen, silent = _chosen(levels, assignment)
    named = tensor_names(architecture.name, len(decoder_blocks(model)))
    source = {tensor.name: tensor for tensor in template.tensors} if template else {}
    kept = {old: new for new, old in enumerate(kept_blocks(model, levels, assignment))}
    experts: dict[str, list[_Source]] = {}
    found: list[GgufTensor] = []
    for parameter_name, parameter in model.named_parameters():
        module = parameter_name.rpartition(".")[0]
        name = named(parameter_name)
        if name is None:
            raise ModelError(
                f"{parameter_name!r} has no name in llama.cpp's {architecture.name}: it cannot be exported"
            )
        if (block := _BLOCK.match(name)) and int(block[1]) not in kept:
            continue
        level = chosen.get(module) if parameter_name.endswith(".weight") else None
        one = _Source(name, parameter.detach(), level, _is_silent(module, silent))
        if name.endswith("_exps.weight"):
            experts.setdefault(name, []).append(one)
        elif template and not one.searched and name not in (types or {}):
            found.append(_of_template(name, parameter.shape, source))
        else:
            found.append(_laid_out(_made(one, (types or {}).get(name)), model, architecture))
    for name, members in experts.items():
        if template and not any(member.searched for member in members):
            found.append(_of_template(name, (len(members), *members[0].dense.shape), source))
        else:
            found.append(_stacked(name, [_made(member, None) for member in members]))
    missing = set(source) - {tensor.name for tensor in found} - {n for n in source if _dropped(n, kept)}
    found.extend(_as_it_is(source[name]) for name in source if name in missing and name.startswith("rope_"))
    if other := sorted(name for name in missing if not name.startswith("rope_")):
        raise ModelError(f"the template holds {other[0]!r}, which the model has not: give the model's own file")
    return [replace(tensor, name=_renumbered(tensor.name, kept)) for tensor in found]


@dataclass(frozen=True)
class _Source:
    name: str
    dense: torch.Tensor
    level: GgmlBlocks | torch.Tensor | None
    silent: bool

    @property
    def searched(self) -> bool:
        """Whether a unit says what it is."""
        return self.level is not None or self.silent


def kept_blocks(model: nn.Module, levels: LevelSet, assignment: Sequence[int]) -> list[int]:
    """Numbers of the blocks that do something: the others leave the file.

    All stay where blocks attend in different ways by their numbers, and some would get another's.

    Raises:
        ModelError: none is left.
    """
    _, silent = _chosen(levels, assignment)
    kept = []
    for number, (name, block) in enumerate(decoder_blocks(model).items()):
        parts = [child for child, module in block.named_children() if any(p.dim() > 1 for p in module.parameters())]
        if not _is_silent(name, silent) and not all(f"{name}.{child}" in silent for child in parts):
            kept.append(number)
    if not kept:
        raise ModelError("the profile drops every block: nothing is left to export")
    config: Any = model.config
    kinds = getattr(config, "layer_types", None) or [None] * (number + 1)
    moved = any(kinds[old] != kinds[new] for new, old in enumerate(kept))
    return list(range(number + 1)) if moved else kept


def _chosen(levels: LevelSet, assignment: Sequence[int]) -> tuple[dict[str, GgmlBlocks | torch.Tensor], frozenset[str]]:
    """Module -> what it holds at the assignment (blocks, or what no GGUF file holds as it is), and what is dropped."""
    chosen: dict[str, GgmlBlocks | torch.Tensor] = {}
    silent = set()
    for unit, level in enumerate(assignment):
        blocks = {n: e for n, e in levels.encoded(unit, level).items() if isinstance(e, GgmlBlocks)}
        chosen |= blocks
        if len(blocks) < len(levels.units[unit].members):
            for name, weight in levels.weights(unit, level).items():
                if weight is None:
                    silent.add(name)
                elif name not in blocks:
                    chosen[name] = weight
    return chosen, frozenset(silent)


def _is_silent(module: str, silent: frozenset[str]) -> bool:
    parts = module.split(".")
    return any(".".join(parts[:end]) in silent for end in range(1, len(parts) + 1))


def plain_type(name: str, dimensions: int) -> str:
    """The type of a tensor that was not searched, without a template: vectors and routers are in single precision."""
    return "F32" if dimensions == 1 or "ffn_gate_inp" in name else "F16"


def _made(source: _Source, wanted: str | None) -> GgufTensor:
    """One matrix or vector in the layout of transformers."""
    name, level = source.name, source.level
    if isinstance(level, GgmlBlocks):
        return GgufTensor(name, level.type, level.blocks.numpy(), True)
    dense = source.dense if level is None else level
    columns = dense.shape[-1]
    if plain_type(name, dense.dim()) == "F32":
        dense = torch.zeros_like(dense) if source.silent else dense
        return GgufTensor(name, "F32", np.ascontiguousarray(dense.float().numpy()).view(np.uint8))
    if source.silent:
        smallest = zeros_type(columns)
        return GgufTensor(name, smallest, np.zeros((dense.shape[0], row_bytes(smallest, columns)), np.uint8))
    chosen = wanted or "F16"
    if columns % block_size(chosen):
        raise InvalidSettingError(
            f"{name} cannot be {chosen}: its rows of {columns} weights are no multiple of {block_size(chosen)}"
        )
    return GgufTensor(name, chosen, quantize(dense, chosen).numpy())


def _laid_out(tensor: GgufTensor, model: nn.Module, architecture: Architecture) -> GgufTensor:
    """From the layout of transformers to llama.cpp's."""
    config: Any = model.config
    if architecture.shifted and tensor.name.endswith("norm.weight"):
        return replace(tensor, data=(tensor.data.view(np.float32) + 1).view(np.uint8))
    heads = {"q": config.num_attention_heads, "k": getattr(config, "num_key_value_heads", config.num_attention_heads)}
    if architecture.paired and (found := re.search(r"\.attn_([qk])\.(weight|bias)$", tensor.name)):
        rows = tensor.data if tensor.data.ndim > 1 else tensor.data.view(np.float32)
        order = np.arange(len(rows)).reshape(heads[found[1]], 2, -1).swapaxes(1, 2).reshape(-1)
        return replace(tensor, data=np.ascontiguousarray(rows[order]).view(np.uint8))
    return tensor


def _stacked(name: str, members: Sequence[GgufTensor]) -> GgufTensor:
    if len({member.type for member in members}) > 1:
        raise ModelError(
            f"the experts of {name!r} have different types, a GGUF file holds one for all: tie them in the plan, with"
            ' tie = [["experts.gate_proj"], ...] one list a projection'
        )
    return replace(members[0], data=np.stack([member.data for member in members]))


def _of_template(name: str, wanted: Sequence[int], source: Mapping[str, Any]) -> GgufTensor:
    tensor = source.get(name)
    shape = None if tensor is None else tuple(map(int, reversed(tensor.shape)))
    if shape != tuple(wanted):
        raise ModelError(f"the template has {name!r} of shape {shape}, the model {tuple(wanted)}")
    return _as_it_is(tensor)


def _as_it_is(tensor: Any) -> GgufTensor:
    return GgufTensor(tensor.name, tensor.tensor_type.name, np.ascontiguousarray(tensor.data).view(np.uint8))


def _dropped(name: str, kept: Mapping[int, int]) -> bool:
    block = _BLOCK.match(name)
    return block is not None and int(block[1]) not in kept


def _renumbered(name: str, kept: Mapping[int, int]) -> str:
    return _BLOCK.sub(lambda found: f"blk.{kept[int(found[1])]}.", name)


def type_lines(tensors: Sequence[GgufTensor]) -> Iterator[str]:
    """Lines of a file for ``llama-quantize --tensor-type-file``: every matrix and its type.

    Names are regular expressions there, looked for anywhere in a name: ``output.weight`` is in ``attn_output.weight``.
    """
    for tensor in tensors:
        if tensor.data.ndim > 1 and tensor.type != "F32":
            yield f"^{re.escape(tensor.name)}$={tensor.type.lower()}\n"
