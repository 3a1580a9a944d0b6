"""GPTQ and SparseGPT written a second time, as plainly as the papers state them: float64, no blocks.

After each column the inverse of H is reduced by one step of Gaussian elimination, and all later columns are corrected
at once. Nothing is shared with `evo_hpo.levels` but the definition of a grid, which is written out again here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def damped_inverse(hessian: Matrix, damping: float = 0.01) -> Matrix:
    """(H + damping x mean of the diagonal)^-1."""
    identity = np.eye(len(hessian))
    inverse: Matrix = np.linalg.inv(hessian + damping * hessian.diagonal().mean() * identity)
    return inverse


def fit(group: Matrix, bits: int, symmetric: bool = False) -> tuple[Matrix, Matrix]:
    """Scale and zero point of each row of a group (rows x columns of the group); bits from 2."""
    low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    scale = (high - low) / (2**bits - 1)
    scale[scale == 0] = 1
    scale = (scale * 256).astype(np.float16).astype(np.float64) / 256  # stores keep half-precision scales
    zero = np.full_like(scale, 2 ** (bits - 1)) if symmetric else np.round(-low / scale)
    return scale, zero


def gptq(
    weight: Matrix,
    hessian: Matrix,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    static_groups: bool = True,
    activation_order: bool = False,
    damping: float = 0.01,
) -> Matrix:
    """Quantized weights (rows x columns)."""
    columns = weight.shape[1]
    order = np.argsort(-hessian.diagonal(), kind="stable") if activation_order else np.arange(columns)
    inverse = damped_inverse(hessian, damping)
    current, result = weight.copy(), np.zeros_like(weight)
    grids = [fit(weight[:, g : g + group_size], bits, symmetric) for g in range(0, columns, group_size)]
    scale, zero = grids[0]
    for position, j in enumerate(order):
        if static_groups:
            scale, zero = grids[j // group_size]
        elif position % group_size == 0:
            scale, zero = fit(current[:, order[position : position + group_size]], bits, symmetric)
        codes = np.clip(np.round(current[:, j] / scale + zero), 0, 2**bits - 1)
        result[:, j] = (codes - zero) * scale
        error = (current[:, j] - result[:, j]) / inverse[j, j]
        current = current - np.outer(error, inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


def sparsegpt(weight: Matrix, hessian: Matrix, sparsity: float, block: int = 128, damping: float = 0.01) -> Matrix:
    """Pruned weights (rows x columns); `block` columns choose together, by the saliency of optimal brain surgery."""
    rows, columns = weight.shape
    inverse = damped_inverse(hessian, damping)
    current, removed = weight.copy(), round(sparsity * weight.size)
    mask = np.ones(weight.shape, dtype=bool)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        pivots, reduced = np.zeros(end - start), inverse.copy()
        for j in range(start, end):
            pivots[j - start] = reduced[j, j]
            reduced = reduced - np.outer(reduced[:, j], reduced[j]) / reduced[j, j]
        count = removed * end // columns - removed * start // columns
        saliency = current[:, start:end] ** 2 / pivots
        chosen = np.argsort(saliency, axis=None)[:count]
        mask[:, start:end] = ~np.isin(np.arange(saliency.size), chosen).reshape(rows, -1)
        for j in range(start, end):
            error = np.where(mask[:, j], 0, current[:, j]) / inverse[j, j]
            current = current - np.outer(error, inverse[j])
            inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return np.where(mask, current, 0)


def relative_error(weight: Matrix, compressed: Matrix, hessian: Matrix) -> float:
    """trace(dW H dW^T) / trace(W H W^T)."""
    difference = weight - compressed
    return float(np.einsum("ij,jk,ik", difference, hessian, difference, optimize=True)) / float(
        np.einsum("ij,jk,ik", weight, hessian, weight, optimize=True)
    )
