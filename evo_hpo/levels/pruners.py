"""Pruning as compressors: SparseGPT, and magnitude and Wanda for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.compressor import CompressedLevel, Compressor, Inputs
from evo_hpo.levels.factor import check_damping, output_energy
from evo_hpo.levels.masks import Sparsity, lowest, lowest_in_each_row, lowest_n_of_m, parse_sparsities
from evo_hpo.levels.packing import PackedSparse
from evo_hpo.levels.sparsegpt import sparsegpt

_VALUES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class _Pruner(Compressor):
    """What pruners share.

    Args:
        sparsities: shares of weights to remove (0 to 1), or patterns such as "2:4".
        step, steps: levels that differ by the same number of weights in every unit; see `parse_sparsities`.
        values: dtype in which kept weights are stored.
    """

    resource: ClassVar[str] = "weights"

    def __init__(
        self,
        sparsities: Sequence[float | str] = (0.3, 0.4, 0.5, 0.6, 0.7),
        *,
        step: int | None = None,
        steps: int = 8,
        values: str = "float16",
    ) -> None:
        if values not in _VALUES:
            raise InvalidSettingError(f"values={values!r} must be one of {', '.join(_VALUES)}")
        self.levels = parse_sparsities(sparsities, step, steps)
        self.values = values
        given = sorted(parse_sparsities(sparsities), key=lambda level: (level.share, level.label))
        spelled = [level.spelling for level in given]  # however they were given, the same levels are the same store
        self._given = {"sparsities": spelled, "step": step, "steps": steps if step else None}

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(level.label for level in self.levels)

    @property
    def everywhere(self) -> tuple[str, ...]:
        return tuple(level.label for level in self.levels if level.extra == 0)

    def offered(self, rows: int, columns: int) -> tuple[str, ...]:
        return tuple(level.label for level in self.fitting(rows * columns))

    def unfit(self, rows: int, columns: int) -> str:
        return f"{rows * columns} weights are too few for the steps"

    def fitting(self, size: int) -> list[Sparsity]:
        """The levels of a layer of so many weights."""
        return [level for level in self.levels if level.fits(size)]

    def settings(self) -> dict[str, Any]:
        return {**self._given, "values": self.values}

    def _encoded(self, weight: torch.Tensor, kept: torch.Tensor) -> tuple[PackedSparse, torch.Tensor]:
        packed = PackedSparse.from_dense(weight, kept, _VALUES[self.values])
        return packed, packed.decode().to(weight.device)

    def _level(self, level: Sparsity, packed: PackedSparse, error: float) -> CompressedLevel:
        kept = packed.values.numel()
        return CompressedLevel(level.label, packed, 16 * kept, kept, error)


class SparseGPT(_Pruner):
    """SparseGPT at several sparsities from one factorisation.

    Args:
        damping: added to H's diagonal, as a fraction of its mean.
        block: columns whose removed weights are chosen together.
        activation_order: walk columns by falling diagonal of H; not with n:m patterns, which need their own order.
    """

    name = "sparsegpt"
    needs = "hessian"

    def __init__(
        self,
        sparsities: Sequence[float | str] = (0.3, 0.4, 0.5, 0.6, 0.7),
        *,
        step: int | None = None,
        steps: int = 8,
        values: str = "float16",
        damping: float = 0.01,
        block: int = 128,
        activation_order: bool = False,
    ) -> None:
        super().__init__(sparsities, step=step, steps=steps, values=values)
        check_damping(damping)
        if block < 1:
            raise InvalidSettingError(f"block={block} must be at least 1")
        if activation_order and any(level.pattern for level in self.levels):
            raise InvalidSettingError(
                f"activation_order=True cannot hold the patterns among {list(self.labels)}: build them without it"
            )
        self.damping = damping
        self.block = block
        self.activation_order = activation_order

    def compress(self, weight: torch.Tensor, inputs: Inputs) -> list[CompressedLevel]:
        weight, hessian = weight.float(), inputs.factor.hessian
        energy, levels = output_energy(weight, hessian) or 1.0, self.fitting(weight.numel())
        found = []
        for level, (pruned, kept) in zip(levels, sparsegpt(weight, inputs.factor, levels, self.block), strict=True):
            packed, decoded = self._encoded(pruned, kept)
            found.append(self._level(level, packed, output_energy(weight - decoded, hessian) / energy))
        return found

    def settings(self) -> dict[str, Any]:
        found = {**super().settings(), "damping": self.damping, "block": self.block}
        return {**found, "activation_order": True} if self.activation_order else found  # older stores have no such key


class Magnitude(_Pruner):
    """Remove the smallest weights of each layer: data-free."""

    name = "magnitude"
    needs = "nothing"

    def compress(self, weight: torch.Tensor, inputs: Inputs) -> list[CompressedLevel]:
        weight = weight.float()
        return _by_score(self, weight, weight.abs(), torch.ones(weight.shape[1], device=weight.device), False)


class Wanda(_Pruner):
    """Remove by |w| times the norm of its input, within each output row (Sun et al., 2024); no corrections."""

    name = "wanda"
    needs = "diagonal"

    def compress(self, weight: torch.Tensor, inputs: Inputs) -> list[CompressedLevel]:
        weight, squares = weight.float(), inputs.diagonal
        return _by_score(self, weight, weight.abs() * squares.sqrt(), squares, True)


def _by_score(
    pruner: _Pruner, weight: torch.Tensor, score: torch.Tensor, squares: torch.Tensor, rows: bool
) -> list[CompressedLevel]:
    """Remove the lowest scores at every level; `squares` weighs the columns in the error."""
    energy = float((weight.square() * squares).double().sum()) or 1.0
    found = []
    for level in pruner.fitting(weight.numel()):
        count = level.removed(weight.numel())
        if level.pattern is not None:
            removed = lowest_n_of_m(score, level.pattern)
        else:
            removed = lowest_in_each_row(score, count) if rows else lowest(score, count)
        packed, decoded = pruner._encoded(weight, ~removed)
        error = float(((weight - decoded).square() * squares).double().sum()) / energy
        found.append(pruner._level(level, packed, error))
    return found
