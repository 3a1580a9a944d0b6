"""Per-sequence gradients of one weight against the changes that its levels are, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evo_hpo.search.sensitivities import Form

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
    if form == "trace":
        return torch.outer(*squared_lengths(left, right, place, targets)) / (left.shape[2] * right.shape[2])
    total = torch.zeros(len(left), len(targets), dtype=torch.float64, device=left.device)
    for gradients, changes in _in_rows(left, right, place, targets):
        if form == "absolute":
            gradients, changes = gradients.abs_(), changes.abs_()
        total += gradients @ changes.T
    return total


def squared_lengths(
    left: Tensor, right: Tensor, place: Tensor | None, targets: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """|g_s|^2 of each sequence and |target - place|^2 of each target, float64; see :func:`weight_changes`."""
    lengths = [torch.zeros(n, dtype=torch.float64, device=left.device) for n in (len(left), len(targets))]
    for found in _in_rows(left, right, place, targets):
        for length, rows in zip(lengths, found, strict=True):
            length += rows.square().sum(dim=1)
    return lengths[0], lengths[1]


def _in_rows(
    left: Tensor, right: Tensor, place: Tensor | None, targets: Sequence[Tensor | None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time: the sequences' gradients and the targets' changes, each flat."""
    exact = torch.float64 if right.dtype == torch.float64 else torch.float32
    columns = right.shape[2]
    step = max(16, ELEMENTS // (len(right) * columns))
    for first in range(0, left.shape[2], step):
        rows = slice(first, min(first + step, left.shape[2]))
        gradients = torch.bmm(left[:, :, rows].transpose(1, 2), right).to(exact)
        yield gradients.flatten(1), _changes(place, targets, rows, columns, exact, left.device).flatten(1)


def row_changes(ids: Tensor, gradient: Tensor, place: Tensor, targets: Sequence[Tensor], form: Form) -> Tensor:
    """What :func:`weight_changes` and :func:`output_changes` give, for a table of which each position takes a row.

    Args:
        ids: rows that are taken, sequences x positions.
        gradient: of what is taken, sequences x positions x columns.
        place, targets: the table, rows x columns.
    """
    total = torch.zeros(len(ids), len(targets), dtype=torch.float64, device=ids.device)
    for sums, rows, gradients in zip(total, ids, gradient.float(), strict=True):
        if form in ("absolute", "trace"):
            rows, back = rows.unique(return_inverse=True)
            gradients = gradients.new_zeros(len(rows), place.shape[1]).index_add_(0, back, gradients)
        for number, target in enumerate(targets):
            change = target[rows].float() - place[rows].float()
            if form == "trace":
                whole = (target.float() - place.float()).double().square().sum()
                sums[number] = gradients.double().square().sum() * whole / place.numel()
            else:
                found = (gradients * change).double()
                sums[number] = {"absolute": found.abs, "output": found.square, "inner": lambda f=found: f}[form]().sum()
    return total


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
