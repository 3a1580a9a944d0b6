"""Quantization grids: the scale and zero point of each group of weights, and rounding to them.

Weights are handled transposed (columns x rows, rows last), so that one column of all rows is contiguous.
A weight is scale * (code - zero) with an unsigned code of `bits` bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from evo_hpo.errors import InvalidSettingError

LARGEST_GROUP = 1 << 20
"""Columns that share a scale: no layer has more."""


@dataclass(frozen=True)
class GridSettings:
    """How weights share a scale.

    Args:
        group_size: consecutive input columns that share a scale in each row; None for one scale a row. The last group
            may be shorter.
        symmetric: fixed zero point in the middle of the grid, instead of one fitted to the range of each group.
    """

    group_size: int | None = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.group_size is not None and not 1 <= self.group_size <= LARGEST_GROUP:
            raise InvalidSettingError(
                f"group_size={self.group_size} must be 1 to {LARGEST_GROUP}, or 0 for one scale a row"
            )


@dataclass
class Grid:
    """scale, zero and largest code, broadcastable to the weights they belong to."""

    scale: torch.Tensor
    zero: torch.Tensor
    top: torch.Tensor

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Nearest codes (as floats) of weights."""
        return torch.minimum((weight / self.scale + self.zero).round_().clamp_(min=0), self.top)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Weights that the codes stand for."""
        return (codes - self.zero) * self.scale


def fit_grid(weight: torch.Tensor, top: torch.Tensor, settings: GridSettings, exponent: int) -> Grid:
    """Fit a grid to each row of one group.

    Args:
        weight: columns of the group x ... x rows.
        top: largest code (2 ** bits - 1), broadcastable to ... x rows.
        exponent: see `storable_scale`.
    """
    low, high = weight.amin(0).clamp_(max=0), weight.amax(0).clamp_(min=0)
    if settings.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    span = high - low
    # One bit cannot hold zero and both signs: two values around zero at the mean magnitude lose least.
    span = torch.where(top == 1, 2 * weight.abs().mean(0), span)
    scale = storable_scale(torch.where(span > 0, span / top, torch.ones_like(span)), exponent)
    middle = (top + 1) / 2
    zero = middle.expand_as(scale) if settings.symmetric else torch.minimum((-low / scale).round_(), top)
    return Grid(scale, torch.where(top == 1, torch.full_like(scale, 0.5), zero), top.expand_as(scale))


def storable_scale(scale: torch.Tensor, exponent: int) -> torch.Tensor:
    """Round scales to what the store keeps: a half-precision number times 2 ** exponent."""
    half = (scale * 2.0**-exponent).clamp(2.0**-24, 65504.0).half()
    return half.float() * 2.0**exponent


def scale_exponent(weight: torch.Tensor) -> int:
    """Exponent that puts the scales of this matrix in the middle of the range of half precision."""
    largest = float(weight.abs().max())
    return math.frexp(largest)[1] - 9 if largest > 0 else 0


def column_groups(columns: int, group_size: int | None) -> list[tuple[int, int]]:
    """(start, end) of each group of columns; the last may be shorter."""
    size = columns if group_size is None else group_size
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]
