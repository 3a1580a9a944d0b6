"""Per-sequence gradients of one weight against the changes that its levels are, a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evo_hpo.search.sensitivities import Form

__all__ = ["output_changes", "weight_changes"]

ELEMENTS = 1 << 20
"""Numbers of the per-sequence gradients that exist at one time: rows of a weight are taken by so many."""


def weight_changes(
    left: Tensor, right: Tensor, place: Tensor | None, targets: Sequence[Tensor | None], form: Form = "inner"
) -> Tensor:
    """<g_s, target - place> with g_s = left_s^T right_s, for each sequence s and target (sequences x targets, float64).

    Form ``absolute``: <|g_s|, |target - place|>; ``trace``: |g_s|^2 |target - place|^2 over the number of weights.

    Args:
        left: sequences x positions x rows. right: sequences x positions x columns.
        place, targets: rows x columns; None: nothing.
    """
    exact = torch.float64 if right.dtype == torch.float64 else torch.float32
    total = torch.zeros(len(left), len(targets), dtype=torch.float64, device=left.device)
    lengths = [torch.zeros(n, dtype=torch.float64, device=left.device) for n in total.shape]
    columns = right.shape[2]
    step = max(16, ELEMENTS // (len(right) * columns))
    for first in range(0, left.shape[2], step):
        rows = slice(first, min(first + step, left.shape[2]))
        changes = _changes(place, targets, rows, columns, exact, left.device)
        gradients = torch.bmm(left[:, :, rows].transpose(1, 2), right).to(exact)
        if form == "trace":
            lengths[0] += gradients.flatten(1).square().sum(dim=1)
            lengths[1] += changes.flatten(1).square().sum(dim=1)
            continue
        if form == "absolute":
            gradients, changes = gradients.abs_(), changes.abs_()
        total += gradients.flatten(1) @ changes.flatten(1).T
    return torch.outer(*lengths) / (left.shape[2] * columns) if form == "trace" else total


def output_changes(
    gradient: Tensor,
    given: Tensor,
    place: Tensor | None,
    targets: Sequence[Tensor | None],
    shifts: Sequence[Tensor] | None,
    transposed: bool,
) -> Tensor:
    """Sum over positions and outputs of (gradient x change of the output)^2 (sequences x targets, float64).

    Args:
        gradient: of the outputs, sequences x positions x outputs. given: the inputs, sequences x positions x inputs.
        place, targets: outputs x inputs, or inputs x outputs where ``transposed``; None: nothing.
        shifts: change of the bias at each target.
    """
    exact = torch.float64 if given.dtype == torch.float64 else torch.float32
    total = torch.zeros(len(gradient), len(targets), dtype=torch.float64, device=gradient.device)
    if transposed:
        place, targets = None if place is None else place.T, [None if t is None else t.T for t in targets]
    inputs = given.to(exact)
    step = max(16, ELEMENTS // (gradient.shape[0] * gradient.shape[1]))
    for first in range(0, gradient.shape[2], step):
        rows = slice(first, min(first + step, gradient.shape[2]))
        weights = gradient[:, :, rows].to(exact)
        changes = _changes(place, targets, rows, given.shape[2], exact, gradient.device)
        for number, change in enumerate(changes):
            moved = inputs @ change.T
            if shifts is not None:
                moved += shifts[number][rows]
            total[:, number] += (moved * weights).square_().sum(dim=(1, 2), dtype=torch.float64)
    return total


def _changes(
    place: Tensor | None,
    targets: Sequence[Tensor | None],
    rows: slice,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Some rows of target - place, targets x rows x columns."""
    changes = torch.zeros(len(targets), rows.stop - rows.start, columns, dtype=dtype, device=device)
    for change, target in zip(changes, targets, strict=True):
        if target is not None:
            change.copy_(target[rows])
        if place is not None:
            change.sub_(place[rows])
    return changes
