"""Per-sequence gradients of one weight against the changes that its levels are, a block of rows at a time.

With g_s = left_s^T right_s, <g_s, change> is also the sum over positions of left_s . (change right_s): how the outputs
would move. The gradients of every part of every sequence are far larger than those outputs, so where products of 16-bit
numbers take next to no time it is the outputs that are computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evo_hpo.scoring import devices
from evo_hpo.scoring.prepacking import product_by
from evo_hpo.search.sensitivities import Form

ELEMENTS = 1 << 20
"""Numbers of the per-sequence gradients that exist at one time on a CPU: rows of a weight are taken by so many."""

ELEMENTS_ELSEWHERE = 1 << 27
"""The same on a GPU (0.8 GB, in bfloat16 and in single precision): all rows of a small model's
layers, since an operation on fewer takes longer to start than to do."""

LONGEST = 1 << 20
"""Most products that are summed in single precision there, before sums in double precision go on."""

SEQUENCES = 8
"""Sequences, or parts of them, whose gradients exist at one time on a CPU: with more of them, fewer rows do, and narrow
products take longer."""

OUTPUTS = 1 << 27
"""Numbers of moved outputs, and of changed weights, that exist at one time on a GPU (0.3 GB each, of 16 bits)."""

OUTPUTS_ON_A_CPU = 1 << 23
"""Numbers of changed weights that exist at one time on each core of a CPU; no bit may depend on how many positions a
core has, so those are not asked."""

PRODUCTS = 1 << 15
"""Small products in one operation: of more than 65 535 some versions of cuBLAS made nonsense."""

Seen = Sequence[tuple[Tensor, Tensor]]
"""Pairs of left and right, one a run: sequences x positions x rows, sequences x positions x columns; runs may differ in
sequences and positions."""


def weight_changes(seen: Seen, place: Tensor | None, targets: Sequence[Tensor | None], form: Form = "inner") -> Tensor:
    """<g_s, target - place> with g_s = left_s^T right_s, for each sequence s and target (sequences x targets; float64
    where gradients are taken some rows at a time, else in the precision in which products are summed).

    Form ``absolute``: <|g_s|, |target - place|>; ``trace``: |g_s|^2 |target - place|^2 over the number of weights.

    Args:
        seen: left and right of each run.
        place, targets: rows x columns; None: nothing.
    """
    left, right = seen[0]
    if form == "inner" and moves_outputs(left):
        return _by_outputs(seen, place, targets)
    if form == "trace":
        return torch.outer(*squared_lengths(seen, place, targets)) / (left.shape[2] * right.shape[2])
    if len(seen) == 1 and _all_at_once(left, right):
        changes = _changes(place, targets, slice(0, left.shape[2]), right.shape[2], _exact(right), left.device)
        gradients = torch.bmm(left.transpose(1, 2), right).to(_exact(right))
        changes, gradients = (x.abs_() if form == "absolute" else x for x in (changes, gradients))
        return gradients.flatten(1) @ changes.flatten(1).T
    total = torch.zeros(_sequences(seen), len(targets), dtype=torch.float64, device=left.device)
    for changes, blocks in _in_rows(seen, place, targets):
        changes = changes.abs_() if form == "absolute" else changes
        for sequences, gradients in blocks:
            gradients = gradients.abs_() if form == "absolute" else gradients
            total[sequences] += (changes @ gradients.T).T
    return total


def moves_outputs(left: Tensor) -> bool:
    """Whether moved outputs are computed, not gradients."""
    return left.dtype == torch.bfloat16 and devices.has_matrix_units(left.device)


def moved_sums(left: Tensor, right: Tensor, changes: Tensor) -> Tensor:
    """Sums over positions of left . (change right), for several layers of one shape: layers x parts x targets, float32.

    Args:
        left, right: layers x parts x positions x rows, or x columns.
        changes: layers x targets x rows x columns.
    """
    layers, targets, rows, columns = changes.shape
    parts, positions = left.shape[1:3]
    moved = torch.bmm(right.reshape(layers, -1, columns), changes.flatten(1, 2).transpose(1, 2))
    sides = moved.view(-1, targets, rows), left.reshape(-1, rows, 1)
    products = [torch.bmm(*pair) for pair in zip(*(torch.split(side, PRODUCTS) for side in sides), strict=True)]
    each = products[0] if len(products) == 1 else torch.cat(products)
    return each.view(layers, parts, positions, targets).sum(dim=2, dtype=torch.float32)


def output_rows(device: torch.device, targets: int, rows: int, positions: int, columns: int) -> tuple[int, int]:
    """Layers whose outputs are moved together, and rows of them at a time: some of one layer's where it is large."""
    on_cpu = devices.has_small_caches(device)
    most, each = OUTPUTS_ON_A_CPU if on_cpu else OUTPUTS, targets * (columns if on_cpu else max(positions, columns))
    return max(1, most // (each * rows)), min(rows, max(1, most // each))


def _by_outputs(seen: Seen, place: Tensor | None, targets: Sequence[Tensor | None]) -> Tensor:
    left, right = seen[0]
    height, columns, count = left.shape[2], right.shape[2], len(targets)
    positions = max(each.shape[0] * each.shape[1] for each, _ in seen)
    _, step = output_rows(left.device, count, height, positions, columns)
    total = torch.zeros(_sequences(seen), count, device=left.device)
    for first in range(0, height, step):
        rows = slice(first, min(first + step, height))
        changes = _changes(place, targets, rows, columns, left.dtype, left.device)
        if devices.has_small_caches(left.device):
            found = _run_by_run([(own[..., rows], given) for own, given in seen], changes)
        else:
            found = [moved_sums(own[None, ..., rows], given[None], changes[None])[0] for own, given in seen]
        total += torch.cat(found)
    return total


def _run_by_run(seen: Seen, changes: Tensor) -> list[Tensor]:
    """What :func:`moved_sums` gives for one layer, on a CPU: of each run, parts x targets."""
    multiply = product_by(changes.flatten(0, 1))
    moved = (multiply(given.flatten(0, 1)).view(*given.shape[:2], *changes.shape[:2]) for _, given in seen)
    each = (torch.linalg.vecdot(m, own.unsqueeze(2)) for m, (own, _) in zip(moved, seen, strict=True))
    return [products.sum(dim=1, dtype=torch.float32) for products in each]


def squared_lengths(seen: Seen, place: Tensor | None, targets: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """|g_s|^2 of each sequence and |target - place|^2 of each target, float64; see :func:`weight_changes`."""
    device, counts = seen[0][0].device, (_sequences(seen), len(targets))
    gradient, change = (torch.zeros(count, dtype=torch.float64, device=device) for count in counts)
    for changes, blocks in _in_rows(seen, place, targets):
        change += changes.square().sum(dim=1)
        for sequences, gradients in blocks:
            gradient[sequences] += gradients.square().sum(dim=1)
    return gradient, change


def _all_at_once(left: Tensor, right: Tensor) -> bool:
    """Whether all rows and sequences of one run are taken together."""
    columns = right.shape[2]
    return (
        not devices.has_small_caches(left.device) and _rows_at_a_time(left.device, len(left), columns) >= left.shape[2]
    )


def _exact(values: Tensor) -> torch.dtype:
    """In which products with such values are summed."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _rows_at_a_time(device: torch.device, together: int, columns: int) -> int:
    """Rows of so many columns, of which so many matrices exist at one time."""
    if devices.has_small_caches(device):
        return max(16, ELEMENTS // (together * columns))
    return max(1, min(ELEMENTS_ELSEWHERE // together, LONGEST) // columns)


def _sequences(seen: Seen) -> int:
    return sum(len(left) for left, _ in seen)


def _in_rows(
    seen: Seen, place: Tensor | None, targets: Sequence[Tensor | None]
) -> Iterator[tuple[Tensor, Iterator[tuple[slice, Tensor]]]]:
    """Some rows at a time: the targets' changes; and, of some sequences at a time, the gradients; each flat."""
    left, right = seen[0]
    exact = _exact(right)
    height, columns, together = left.shape[2], right.shape[2], max(len(each) for each, _ in seen)
    if devices.has_small_caches(left.device):
        together = min(together, SEQUENCES)
    step = min(_rows_at_a_time(left.device, together, columns), height)
    # The same memory for all of them: pages fresh from the system cost as much as the products.
    product = right.new_empty(together * step * columns)
    wide = product if right.dtype == exact else torch.empty_like(product, dtype=exact)

    def gradients(rows: slice) -> Iterator[tuple[slice, Tensor]]:
        done = 0
        for left, right in seen:
            for first in range(0, len(left), together):
                some = slice(first, min(first + together, len(left)))
                shape = (some.stop - some.start, rows.stop - rows.start, columns)
                narrow, found = (memory[: math.prod(shape)].view(shape) for memory in (product, wide))
                torch.bmm(left[some, :, rows].transpose(1, 2), right[some], out=narrow)
                found = found if wide is product else found.copy_(narrow)
                yield slice(done + some.start, done + some.stop), found.flatten(1)
            done += len(left)

    for first in range(0, height, step):
        rows = slice(first, min(first + step, height))
        yield _changes(place, targets, rows, columns, exact, left.device).flatten(1), gradients(rows)


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
    seen: Seen,
    place: Tensor | None,
    targets: Sequence[Tensor | None],
    shifts: Sequence[Tensor] | None,
    transposed: bool,
) -> Tensor:
    """Sum over positions and outputs of (gradient x change of the output)^2 (sequences x targets, float64).

    Args:
        seen: of each run, gradients of the outputs and inputs.
        place, targets: outputs x inputs, or inputs x outputs where ``transposed``; None: nothing.
        shifts: change of the bias at each target.
    """
    gradient, given = seen[0]
    exact = _exact(given)
    height, columns = gradient.shape[2], given.shape[2]
    total = torch.zeros(_sequences(seen), len(targets), dtype=torch.float64, device=gradient.device)
    if transposed:
        place, targets = None if place is None else place.T, [None if t is None else t.T for t in targets]
    positions = max(left.shape[0] * left.shape[1] for left, _ in seen)
    step = _rows_at_a_time(gradient.device, 1, max(positions, columns))
    for first in range(0, height, step):
        rows = slice(first, min(first + step, height))
        changes, done = _changes(place, targets, rows, columns, exact, gradient.device), 0
        for left, right in seen:
            weights, inputs = left[:, :, rows].to(exact), right.to(exact)
            for number, change in enumerate(changes):
                moved = inputs @ change.T
                if shifts is not None:
                    moved += shifts[number][rows]
                sums = (moved * weights).square_().sum(dim=(1, 2), dtype=torch.float64)
                total[done : done + len(left), number] += sums
            done += len(left)
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
    there = next((target for target in targets if target is not None), None)
    if there is not None and not devices.has_small_caches(device):
        nothing = there if all(target is not None for target in targets) else there.new_zeros(()).expand(there.shape)
        whole = rows.stop - rows.start == len(there)  # a slice of all rows would be started for nothing
        each = (nothing if target is None else target for target in targets)
        found = torch.stack([(target if whole else target[rows]).to(device) for target in each]).to(dtype)
        return found if place is None else found.sub_(place if whole else place[rows])
    every = place is not None and all(target is not None for target in targets)
    make = torch.empty if every else torch.zeros
    changes = make(len(targets), rows.stop - rows.start, columns, dtype=dtype, device=device)
    for change, target in zip(changes, targets, strict=True):
        if target is not None and place is not None and target.dtype == place.dtype == dtype:
            torch.sub(target[rows], place[rows], out=change)
            continue
        if target is not None:
            change.copy_(target[rows])
        if place is not None:
            change.sub_(place[rows])
    return changes
