"""The one factorisation that every level of a layer, and every layer with the same inputs, shares."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from evo_hpo.errors import InvalidSettingError, ModelError

_RAISED = 20
"""Times that damping is raised tenfold: far beyond what rounding of H can ask for."""


@dataclass(frozen=True)
class Factor:
    """Upper triangular U with U^T U = (H + damping)^-1, both in the order in which columns are processed.

    Attributes:
        upper: columns x columns.
        order: position -> column; None where columns are processed as they stand.
        hessian: the undamped H in the original order, for errors.
    """

    upper: torch.Tensor
    order: torch.Tensor | None
    hessian: torch.Tensor


def factorise(hessian: torch.Tensor, damping: float = 0.01, activation_order: bool = False) -> Factor:
    """Factorise H = sum of x x^T over the calibration tokens (columns x columns, float32).

    Args:
        damping: added to the diagonal, as a fraction of its mean; raised tenfold until the factorisation succeeds.
        activation_order: process columns by falling diagonal of H.

    Raises:
        ModelError: H is not finite, or cannot be factorised however it is damped.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ModelError("H is not finite: the layer's inputs are NaN, infinite or too large to be squared")
    check_damping(damping)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if activation_order else None
    damped = hessian.clone() if order is None else hessian[order][:, order]
    diagonal = damped.diagonal()
    mean = float(diagonal.mean())
    diagonal[diagonal == 0] = mean or 1.0  # an input that never fired: nothing to correct, any positive number will do
    step = damping * (mean or 1.0)
    diagonal += step
    for _ in range(_RAISED):
        # With H = V V^T, V upper triangular, U = V^-1: one factorisation and one triangular inverse, no explicit H^-1.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            break
        damped.diagonal().add_(9 * step)
        step *= 10
    else:
        raise ModelError(f"H cannot be factorised with {step / 10:g} added to its diagonal: it is no sum of x x^T")
    identity = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return Factor(upper.contiguous(), order, hessian)


def check_damping(damping: float) -> None:
    """Raises InvalidSettingError where H cannot be damped so."""
    if not 0 < damping < math.inf:
        raise InvalidSettingError(f"damping={damping} must be a number above 0 (the usual value is 0.01)")


def output_energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """trace(W H W^T): squared norm of the layer's output on the calibration tokens; weight is rows x columns."""
    return float(torch.linalg.vecdot(weight @ hessian, weight).double().sum())


def output_error(weight: torch.Tensor, compressed: torch.Tensor, hessian: torch.Tensor) -> float:
    """Relative squared error of the layer's output, trace(dW H dW^T) / trace(W H W^T); lower is better."""
    energy = output_energy(weight, hessian)
    return output_energy(weight - compressed, hessian) / energy if energy > 0 else 0.0
