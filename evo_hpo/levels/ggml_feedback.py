"""GPTQ's error feedback (Frantar et al., 2023) on the grids of ggml types: other codes, in blocks of the same bytes.

llama.cpp's scales of a block are kept; its codes are chosen anew, column by column, the largest inputs first, each
column's error spread over those to come. Types whose blocks are 32 codes and one scale can have that; of them these are
the ones that it was measured to improve (docs/serve.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from evo_hpo.levels.factor import Factor

BITS: Mapping[str, int] = {"Q4_0": 4, "Q5_0": 5}
"""Type -> bits of a code."""


def with_feedback(weight: torch.Tensor, blocks: torch.Tensor, name: str, factor: Factor) -> torch.Tensor:
    """Blocks (uint8, rows x bytes) of a type with codes by GPTQ.

    Args:
        weight: rows x columns, float32.
        blocks: as llama.cpp quantizes it.
        factor: of the inputs; columns in its order.
    """
    bits, upper = BITS[name], factor.upper
    values = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float32, device=weight.device)
    parts = blocks.view(len(blocks), weight.shape[1] // 32, -1).clone()
    scale = parts[..., :2].contiguous().view(torch.float16)[..., 0].float().to(weight.device).T.contiguous()
    divisor = torch.where(scale == 0, 1, scale)  # groups x rows
    order = list(range(weight.shape[1])) if factor.order is None else factor.order.tolist()
    current = weight.T[order]
    codes = torch.empty(current.shape, dtype=torch.uint8, device=weight.device)
    errors = torch.empty(32, len(weight), device=weight.device)
    inverse = (1.0 / upper.diagonal()).tolist()
    for start in range(0, len(current), 32):
        end = start + 32
        for j in range(start, end):
            done, group = j - start, order[j] // 32
            column = torch.addmv(current[j], errors[:done].T, upper[start:j, j], alpha=-1) if done else current[j]
            code = torch.bucketize(column / divisor[group], values[1:] - 0.5)
            codes[order[j]] = code
            errors[done] = (column - values[code] * scale[group]) * inverse[j]
        current[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return _with_codes(parts, codes.T.reshape(len(weight), -1, 32).cpu(), bits)


def _with_codes(parts: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Blocks with other codes (rows x blocks x 32): low nibbles last, of five bits the highest ones before them."""
    low = codes & 15
    parts[..., -16:] = low[..., :16] | low[..., 16:] << 4
    if bits == 5:
        powers = 2 ** torch.arange(8, dtype=torch.int64)
        parts[..., -20:-16] = ((codes >> 4).long().view(*codes.shape[:2], 4, 8) * powers).sum(-1).to(torch.uint8)
    return parts.flatten(1)
