"""SparseGPT at several sparsities at once (Frantar & Alistarh, 2023): one factor, one walk over the columns.

As in `gptq`, weights are transposed and the rows of all levels lie side by side. The weights to remove are chosen
block by block, by w^2 / U_jj^2 on weights that all earlier columns have corrected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.factor import Factor
from evo_hpo.levels.grid import column_groups
from evo_hpo.levels.masks import Pattern, Sparsity, lowest, lowest_n_of_m


@torch.inference_mode()
def sparsegpt(
    weight: torch.Tensor, factor: Factor, levels: Sequence[Sparsity], block: int = 128
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prune one layer to every sparsity.

    Args:
        weight: rows (outputs) x columns (inputs).
        factor: of the layer's inputs.
        levels: sparsities, 0 and 1 included, and n:m patterns.
        block: columns whose removed weights are chosen together.

    Returns:
        For each level the new weights and the mask of kept weights (bool), both rows x columns.

    Raises:
        InvalidSettingError: patterns with columns out of their order.
    """
    results: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    shares = [level for level in levels if level.pattern is None]
    if shares:
        results.update(
            zip([s.label for s in shares], _unstructured(weight.float(), factor, shares, block), strict=True)
        )
    for level in levels:
        if level.pattern is not None:
            results[level.label] = _structured(weight.float(), factor, level.pattern, block)
    return [results[level.label] for level in levels]


def _unstructured(
    weight: torch.Tensor, factor: Factor, levels: Sequence[Sparsity], block: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rows, columns = weight.shape
    order, upper = factor.order, factor.upper
    current = (weight.T if order is None else weight.T[order]).repeat(1, len(levels))
    kept = torch.empty(columns, len(levels) * rows, dtype=torch.bool, device=weight.device)
    diagonal = upper.diagonal()
    for start, end in column_groups(columns, block):
        score = (current[start:end] / diagonal[start:end, None]).square_().view(end - start, len(levels), rows)
        for number, level in enumerate(levels):
            removed = level.removed(rows * columns)  # in all; so far as many as the columns' share of it, exactly
            count = removed * end // columns - removed * start // columns
            kept[start:end, number * rows : (number + 1) * rows] = ~lowest(score[:, number], count)
        _walk(current, kept, upper, start, end)
    return _results(current, kept, order, len(levels), rows)


def _structured(
    weight: torch.Tensor, factor: Factor, pattern: Pattern, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if factor.order is not None:
        raise InvalidSettingError("n:m patterns need columns in their own order: activation_order=False")
    columns = weight.shape[1]
    current = weight.T.clone()
    kept = torch.empty(current.shape, dtype=torch.bool, device=weight.device)
    diagonal = factor.upper.diagonal()
    for start, end in column_groups(columns, max(1, block // pattern.of) * pattern.of):
        errors = torch.zeros(end - start, current.shape[1], device=weight.device)
        for a, b in ((start + a, start + b) for a, b in column_groups(end - start, pattern.of)):
            current[a:b].addmm_(factor.upper[start:a, a:b].T, errors[: a - start], alpha=-1)
            score = (current[a:b] / diagonal[a:b, None]).square_().T
            kept[a:b] = ~lowest_n_of_m(score, pattern).T
            _columns(current, kept, factor.upper, errors[a - start :], a, b)
        current[end:].addmm_(factor.upper[start:end, end:].T, errors, alpha=-1)
    return _results(current, kept, None, 1, weight.shape[0])[0]


def _walk(current: torch.Tensor, kept: torch.Tensor, upper: torch.Tensor, start: int, end: int) -> None:
    """Remove what is not kept in columns start..end, and correct all columns after them."""
    errors = torch.empty(end - start, current.shape[1], device=current.device)
    _columns(current, kept, upper, errors, start, end)
    current[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)


def _columns(
    current: torch.Tensor, kept: torch.Tensor, upper: torch.Tensor, errors: torch.Tensor, start: int, end: int
) -> None:
    """The column steps; each column is corrected by the errors of those since `start` when its turn comes."""
    for j in range(start, end):
        done = j - start
        if done:
            current[j].addmv_(errors[:done].T, upper[start:j, j], alpha=-1)
        torch.mul(current[j], ~kept[j], out=errors[done])
        current[j].sub_(errors[done])
        errors[done].div_(upper[j, j])


def _results(
    current: torch.Tensor, kept: torch.Tensor, order: torch.Tensor | None, levels: int, rows: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if order is not None:
        current = torch.empty_like(current).index_copy_(0, order, current)
        kept = torch.empty_like(kept).index_copy_(0, order, kept)
    parts = zip(torch.split(current, rows, dim=1), torch.split(kept, rows, dim=1), strict=True)
    found = [(weights.T.contiguous(), mask.T.contiguous()) for weights, mask in parts]
    assert len(found) == levels
    return found
