"""llama.cpp's arithmetic on a CPU: the inputs of a matrix are rounded first, as the matrix's ggml type wants them.

Blocks of weights are multiplied by whole numbers there: inputs become 8-bit numbers in blocks of 32 that share a scale
in half precision, or of 256 with one in single precision for K- and I-quants; matrices in 16 bits take inputs in 16
bits. (CUDA and other devices round in blocks of their own.) Gradients pass a rounding as if it were not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.ggml import ggml_inputs, tensor_names
from evo_hpo.levels.level_set import Choice, LevelSet
from evo_hpo.models.gates import output_head
from evo_hpo.models.identity import digest
from evo_hpo.models.loading import source_gguf
from evo_hpo.models.structure import decoder_blocks, linear_modules, outer_matrices, weight_users

Types = Mapping[str, str]
"""Name of a matrix -> the type that its inputs are rounded to: Q8_0, Q8_K, F16 or BF16; missing: they are not."""


def check_arithmetic(arithmetic: str, method: str) -> None:
    """Raises InvalidSettingError where a problem cannot have this arithmetic."""
    if arithmetic not in ("", "llama.cpp") or (arithmetic and method != "ggml"):
        raise InvalidSettingError(
            f"arithmetic={arithmetic!r} must be 'llama.cpp' with method = 'ggml', or empty, as for {method!r}"
        )


def rounded(values: Tensor, kind: str) -> Tensor:
    """Inputs (... x columns) as a type holds them, in their own dtype."""
    if kind in ("F16", "BF16"):
        return values.to(torch.float16 if kind == "F16" else torch.bfloat16).to(values.dtype)
    blocks = values.float().reshape(*values.shape[:-1], -1, 256 if kind == "Q8_K" else 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    whole = (blocks * torch.where(largest > 0, 127 / largest, 0)).round_()
    scale = largest / 127
    return whole.mul_(scale if kind == "Q8_K" else scale.half().float()).view(values.shape).to(values.dtype)


class _StraightThrough(torch.autograd.Function):
    """Rounds on the way forward only."""

    @staticmethod
    def forward(_: Any, values: Tensor, kind: str) -> Tensor:
        return rounded(values, kind)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class InputRounding:
    """Rounds the inputs of a model's matrices, the head's too, in every pass to come.

    Attributes:
        types: what each is rounded to; it may be changed between passes.
    """

    def __init__(self, model: nn.Module, types: Types | None = None) -> None:
        self.types: Types = types or {}
        self._last: tuple[Tensor | None, str, Tensor | None] = (None, "", None)  # q, k and v have one input
        for name, users in weight_users(model, _multiplied(model)).items():
            for module in users:
                module.register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            kind = self.types.get(name)
            if kind is None:
                return None
            given: Tensor = args[0]
            if torch.is_grad_enabled():
                return _StraightThrough.apply(given, kind), *args[1:]  # type: ignore[no-untyped-call]
            if self._last[0] is not given or self._last[1] != kind:
                self._last = given, kind, rounded(given, kind)
            return self._last[2], *args[1:]

        return hook


@dataclass(frozen=True)
class InputTypes:
    """What the inputs of a model's matrices are rounded to, at every assignment; those of the original are not.

    Attributes:
        units: for each level of each unit, of its members.
        others: of matrices that are not searched.
    """

    units: Sequence[Sequence[Types]]
    others: Types

    @property
    def fingerprint(self) -> str:
        """Identifies the roundings of every assignment."""
        return digest([repr((self.units, self.others))])

    @classmethod
    def of(cls, source: Path | None, model: nn.Module, levels: LevelSet) -> InputTypes:
        """Of a loaded model; others have the types of the GGUF file that it was read from, or F16."""
        others = file_types(source, model) if source else dict.fromkeys(_names(model), "F16")
        units = [[_types(level) for level in choices] for _, choices in levels.rows()]
        members = {member for unit in levels.units for member in unit.members}
        return cls(units, {name: kind for name, kind in others.items() if name not in members})

    def at(self, assignment: Sequence[int] | None) -> Types:
        """Of all matrices; None: the original."""
        found: dict[str, str] = {}
        if assignment is not None:
            found |= self.others
            for unit, level in zip(self.units, assignment, strict=True):
                found |= unit[level]
        return found


def inputs_of(arithmetic: str, name: str, model: nn.Module, levels: LevelSet) -> InputTypes | None:
    """What inputs of a loaded model's matrices are rounded to, by a problem's settings; None: they are as they come."""
    return InputTypes.of(source_gguf(name), model, levels) if arithmetic else None


def file_types(path: Path, model: nn.Module) -> Types:
    """What a GGUF file's matrices take, by the names that they have in a model of it."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    held = {tensor.name: ggml_inputs(tensor.tensor_type.name) for tensor in reader.tensors}
    named = tensor_names(reader.fields["general.architecture"].contents(), len(decoder_blocks(model)))
    head = "output.weight" if "output.weight" in held else "token_embd.weight"
    *inside, last = _names(model)
    found = {**{name: held.get(named(f"{name}.weight") or "") for name in inside}, last: held.get(head)}
    return {name: kind for name, kind in found.items() if kind}


def _types(level: Iterable[Choice]) -> Types:
    """A level's; what is no ggml type is written as F16, and what is dropped multiplies nothing."""
    found = {}
    for choice in level:
        settings = choice.level.settings
        if settings.get("kind") != "dropped":
            kind = ggml_inputs(str(settings.get("type", "F16")))
            found.update(dict.fromkeys(choice.unit.members, kind))
    return {name: kind for name, kind in found.items() if kind}


def _multiplied(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> matrix that multiplies; the head, by the name that it is searched under, is the last."""
    return {**linear_modules(model), list(outer_matrices(model))[-1]: output_head(model)}


def _names(model: nn.Module) -> list[str]:
    return list(_multiplied(model))
