"""Round-to-nearest quantization: the grid of each group, and every weight to its nearest code."""

from __future__ import annotations

import torch

from evo_hpo.levels.gptq import check_bits
from evo_hpo.levels.grid import GridSettings, column_groups, fit_grid, scale_exponent
from evo_hpo.levels.packing import Quantized


@torch.inference_mode()
def round_to_nearest(weight: torch.Tensor, bits: int, settings: GridSettings | None = None) -> Quantized:
    """Quantize rows x columns to `bits` bits without calibration."""
    check_bits([bits])
    chosen = settings or GridSettings()
    weight = weight.float()
    exponent = scale_exponent(weight)
    top = torch.tensor(float(2**bits - 1), device=weight.device)
    codes, scales, zeros = [], [], []
    for start, end in column_groups(weight.shape[1], chosen.group_size):
        part = weight.T[start:end]
        grid = fit_grid(part, top, chosen, exponent)
        codes.append(grid.codes(part).to(torch.uint8))
        scales.append(grid.scale)
        zeros.append(grid.zero)
    return Quantized(
        bits=bits,
        codes=torch.cat(codes).T.contiguous(),
        scale=torch.stack(scales, 1),
        zero=torch.stack(zeros, 1),
        exponent=exponent,
        group_size=chosen.group_size or weight.shape[1],
        symmetric=chosen.symmetric,
    )
