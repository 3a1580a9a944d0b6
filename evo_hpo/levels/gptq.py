"""GPTQ for several bit-widths at once (Frantar et al., 2023): one Hessian, one factor, one walk over the columns.

The walk is over transposed weights, with the rows of all bit-widths side by side: a column step is a handful of vector
operations however many levels are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.factor import Factor
from evo_hpo.levels.grid import Grid, GridSettings, column_groups, fit_grid, scale_exponent
from evo_hpo.levels.packing import Quantized


@dataclass(frozen=True)
class GPTQSettings:
    """Settings of GPTQ.

    Args:
        grid: group size and symmetry.
        static_groups: fit every grid to the original weights beforehand; otherwise to the weights as corrected by all
            columns before the group, whatever the block size.
        block: columns between two updates of the columns still to come; changes speed, not the result.
        rows_at_once: rows of all levels that are processed together; bounds memory and keeps the work in cache.
    """

    grid: GridSettings = field(default_factory=GridSettings)
    static_groups: bool = True
    block: int = 32
    rows_at_once: int = 8192

    def __post_init__(self) -> None:
        if self.block < 1 or self.rows_at_once < 1:
            raise InvalidSettingError(f"block={self.block} and rows_at_once={self.rows_at_once} must be at least 1")


def check_bits(bits: Sequence[int]) -> tuple[int, ...]:
    """The bit-widths as a tuple.

    Raises:
        InvalidSettingError: none, repeated, or outside 1..8.
    """
    if not bits or len(set(bits)) != len(bits) or any(not 1 <= b <= 8 for b in bits):
        raise InvalidSettingError(f"bit-widths {list(bits)} must be distinct whole numbers from 1 to 8")
    return tuple(bits)


@torch.inference_mode()
def gptq(
    weight: torch.Tensor, factor: Factor, bits: Sequence[int], settings: GPTQSettings | None = None
) -> list[Quantized]:
    """Quantize one layer to every bit-width.

    Args:
        weight: rows (outputs) x columns (inputs).
        factor: of the layer's inputs.
        bits: bit-widths, each from 1 to 8.

    Returns:
        One `Quantized` a bit-width, in the order of `bits`; columns in their original order.
    """
    chosen = settings or GPTQSettings()
    check_bits(bits)
    weight = weight.float()
    exponent = scale_exponent(weight)
    share = max(1, chosen.rows_at_once // len(bits))
    parts = [_solve(part, factor, bits, chosen, exponent) for part in torch.split(weight, share)]
    group_of = _group_of(factor, weight.shape[1], chosen)
    results = []
    for level, width in enumerate(bits):
        codes, scale, zero = (torch.cat([part[i][level] for part in parts]) for i in range(3))
        results.append(
            Quantized(
                bits=width,
                codes=codes,
                scale=scale,
                zero=zero,
                exponent=exponent,
                group_size=chosen.grid.group_size or weight.shape[1],
                group_of=group_of,
                symmetric=chosen.grid.symmetric,
            )
        )
    return results


def _group_of(factor: Factor, columns: int, settings: GPTQSettings) -> torch.Tensor | None:
    """Group of each column where groups do not follow the columns' own order."""
    if factor.order is None or settings.static_groups:
        return None
    group_of = torch.empty(columns, dtype=torch.int32, device=factor.order.device)
    group_of[factor.order] = torch.arange(columns, dtype=torch.int32, device=group_of.device) // (
        settings.grid.group_size or columns
    )
    return group_of


def _solve(
    weight: torch.Tensor, factor: Factor, bits: Sequence[int], settings: GPTQSettings, exponent: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (levels x rows x columns, uint8), scales and zero points (levels x rows x groups, float32)."""
    rows, columns = weight.shape
    levels, order, upper = len(bits), factor.order, factor.upper
    widths = torch.tensor([2**b - 1 for b in bits], dtype=torch.float32, device=weight.device)
    top = widths.repeat_interleave(rows)
    original = weight.T
    current = (original if order is None else original[order]).repeat(1, levels)  # columns x (levels x rows)
    groups = column_groups(columns, settings.grid.group_size)
    grids: list[Grid] = []
    if settings.static_groups:
        wide = original.repeat(1, levels)
        grids = [fit_grid(wide[a:b], top, settings.grid, exponent) for a, b in groups]
    size = settings.grid.group_size or columns
    group_at = [
        int(c) // size for c in (range(columns) if order is None or not settings.static_groups else order.tolist())
    ]
    codes = torch.empty(columns, levels * rows, dtype=torch.uint8, device=weight.device)
    errors = torch.empty(settings.block, levels * rows, device=weight.device)
    inverse = (1.0 / upper.diagonal()).tolist()
    for start, end in _blocks(columns, settings, size):
        if not settings.static_groups and start % size == 0:
            grids.append(fit_grid(current[start : min(start + size, columns)], top, settings.grid, exponent))
        for j in range(start, end):
            grid, done = grids[group_at[j]], j - start
            column = current[j]
            if done:
                column = torch.addmv(column, errors[:done].T, upper[start:j, j], alpha=-1)
            code = torch.div(column, grid.scale).add_(grid.zero).round_().clamp_(min=0)
            torch.minimum(code, grid.top, out=code)
            codes[j] = code
            error = errors[done]
            torch.sub(column, code.sub_(grid.zero).mul_(grid.scale), out=error).mul_(inverse[j])
        if end < columns:
            current[end:].addmm_(upper[start:end, end:].T, errors[: end - start], alpha=-1)
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
    scale, zero = (torch.stack([getattr(grid, name) for grid in grids]) for name in ("scale", "zero"))
    return tuple(t.view(len(t), levels, rows).permute(1, 2, 0).contiguous() for t in (codes, scale, zero))  # type: ignore[return-value]


def _blocks(columns: int, settings: GPTQSettings, group_size: int) -> list[tuple[int, int]]:
    """Blocks of at most `settings.block` columns; where groups are fitted on the way none crosses a group's border."""
    if settings.static_groups:
        return column_groups(columns, settings.block)
    return [
        (a + start, a + end)
        for a, b in column_groups(columns, group_size)
        for start, end in column_groups(b - a, settings.block)
    ]
