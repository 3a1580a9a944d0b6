"""GPTQ's error feedback (Frantar et al., 2023) on the grids of ggml types: other codes, in blocks of the same bytes.

llama.cpp's scales (and minima) of a block are kept; its codes are chosen anew, column by column, the largest inputs
first, each column's error spread over those to come. Types of blocks of 32 whose values are a scale, perhaps a minimum,
and codes can have that.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from evo_hpo.levels.factor import Factor

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

GRIDS: Mapping[str, tuple[int, ...]] = {
    "IQ4_NL": _IQ4_NL,
    "Q4_0": tuple(range(-8, 8)),
    "Q4_1": tuple(range(16)),
    "Q5_0": tuple(range(-16, 16)),
    "Q5_1": tuple(range(32)),
}
"""Type -> value of each code, in scales above the minimum (of types that end in 1) or above zero."""


def with_feedback(weight: torch.Tensor, blocks: torch.Tensor, name: str, factor: Factor) -> torch.Tensor:
    """Blocks (uint8, rows x bytes) of a type with codes by GPTQ.

    Args:
        weight: rows x columns, float32.
        blocks: as llama.cpp quantizes it.
        factor: of the inputs; columns in its order.
    """
    grid, upper = torch.tensor(GRIDS[name], dtype=torch.float32, device=weight.device), factor.upper
    middles, head = (grid[1:] + grid[:-1]) / 2, 4 if name.endswith("1") else 2
    parts = blocks.view(len(blocks), weight.shape[1] // 32, -1).clone()
    halves = parts[..., :head].contiguous().view(torch.float16).float().to(weight.device)
    scale, low = halves[..., 0].T.contiguous(), halves[..., 1 : head // 2].sum(-1).T.contiguous()  # groups x rows
    divisor = torch.where(scale == 0, 1, scale)
    order = range(weight.shape[1]) if factor.order is None else factor.order.tolist()
    current = weight.T[list(order)]
    codes = torch.empty(current.shape, dtype=torch.uint8, device=weight.device)
    errors = torch.empty(32, len(weight), device=weight.device)
    inverse = (1.0 / upper.diagonal()).tolist()
    for start in range(0, len(current), 32):
        end = start + 32
        for j in range(start, end):
            done, group = j - start, order[j] // 32
            column = torch.addmv(current[j], errors[:done].T, upper[start:j, j], alpha=-1) if done else current[j]
            code = torch.bucketize((column - low[group]) / divisor[group], middles)
            codes[order[j]] = code
            errors[done] = (column - (grid[code] * scale[group] + low[group])) * inverse[j]
        current[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return _with_codes(parts, codes.T.reshape(len(weight), -1, 32).cpu(), len(grid) == 32)


def _with_codes(parts: torch.Tensor, codes: torch.Tensor, five_bits: bool) -> torch.Tensor:
    """Blocks with other codes (rows x blocks x 32): low nibbles last, of five bits the highest ones before them."""
    low = codes & 15
    parts[..., -16:] = low[..., :16] | low[..., 16:] << 4
    if five_bits:
        powers = 2 ** torch.arange(8, dtype=torch.int64)
        parts[..., -20:-16] = ((codes >> 4).long().view(*codes.shape[:2], 4, 8) * powers).sum(-1).to(torch.uint8)
    return parts.flatten(1)
