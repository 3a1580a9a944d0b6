"""Exact early stopping: a candidate whose partial sum exceeds the s-th best total is not among the best s."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Run = Callable[[Sequence[int], Sequence[int]], None]
"""Fills the sums of some candidates on some batches."""

LEAST_GAIN = 0.03
"""Share of sequences that stopping must be expected to save; below it, all candidates run in one go.

It runs the leaders apart from the rest and so shares fewer prefixes among them.
"""


def complete_best(run: Run, sums: NDArray[np.float64], columns: Sequence[slice], keep: int) -> None:
    """Completes at least the best ``keep`` candidates; a row that ends with NaN was stopped.

    A sequence's sum is never negative, so a partial sum bounds the total from below. The candidates that look best
    after the first batch are completed first, which gives the bound; the others follow batch by batch.

    Args:
        run: called with candidates and batch numbers.
        sums: candidates x sequences, NaN where unknown; filled in place. Lower is better.
        columns: each batch's columns of ``sums``.
        keep: how many of the candidates must be complete.
    """
    everyone, batches = range(len(sums)), range(len(columns))
    run(everyone, batches[:1])
    first = sums[:, columns[0]].sum(axis=1)
    order = sorted(everyone, key=lambda i: (first[i], i))
    leaders, rest = order[:keep], order[keep:]
    if _expected_gain(first, order, keep) < LEAST_GAIN:
        run(everyone, batches[1:])
        return
    run(leaders, batches[1:])
    bound = max(float(sums[i].sum()) for i in leaders)
    bound += 1e-6 * abs(bound) + 1e-9  # rounding must not stop an equal
    for batch in batches[1:]:
        rest = [i for i in rest if float(np.nansum(sums[i])) <= bound]
        if not rest:
            return
        run(rest, [batch])


def _expected_gain(first: NDArray[np.float64], order: Sequence[int], keep: int) -> float:
    """Share of all reading that is saved if every candidate's total is proportional to its first batch."""
    bound = first[order[keep - 1]]
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(first > bound, 1 - bound / first, 0.0)
    return float(np.nan_to_num(shares, nan=1.0).mean())
