"""How far the surrogate is off on assignments that it has not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.measurements.landscapes.fitting import fit, optimise
from benchmarks.problems.surrogate import Array, Features

NEAR = 30
"""Units changed from uniform, up to which an assignment counts as near it."""

Levels = NDArray[np.integer[Any]]


def cross_validated(
    features: Features, levels: Levels, losses: Array, settings: Array, folds: int = 5, interactions: bool = True
) -> Array:
    """Predicted loss of every row by a fit without its fold; hyperparameters are refined without it too."""
    order = np.random.default_rng(0).permutation(len(losses))
    found = np.empty(len(losses))
    for fold in range(folds):
        out = np.zeros(len(losses), dtype=bool)
        out[order[fold::folds]] = True
        found[out] = _predicted(features, levels, losses, settings, out, interactions)
    return found


def ahead(features: Features, levels: Levels, losses: Array, settings: Array, first: int, step: int) -> Array:
    """Predictions of rows from ``first`` on, ``step`` at a time, by fits on the rows before them only.

    This is what a search on the surrogate meets: the rows are where searches on earlier fits ended.
    """
    found = np.full(len(losses), np.nan)
    for begin in range(first, len(losses), step):
        out = np.zeros(min(begin + step, len(losses)), dtype=bool)
        out[begin:] = True
        found[: len(out)][out] = _predicted(features, levels[: len(out)], losses[: len(out)], settings, out)
    return found


def _predicted(
    features: Features,
    levels: Levels,
    losses: Array,
    settings: Array,
    out: NDArray[np.bool_],
    interactions: bool = True,
) -> Array:
    refined = optimise(features, levels[~out], losses[~out], settings, steps=2, interactions=interactions)
    return np.exp(fit(features, levels[~out], losses[~out], refined).many(levels[out]))


def errors(predicted: Array, losses: Array, chosen: NDArray[np.bool_]) -> dict[str, float]:
    """Figures over the chosen rows.

    Returns:
        r2: of log loss; spearman: rank correlation; median: median of |predicted / loss - 1|; p90: its 90 % quantile;
        bias: median of predicted / loss - 1 (negative: the surrogate promises too much); rows: how many.
    """
    told, true = np.log(predicted[chosen]), np.log(losses[chosen])
    relative = np.exp(told - true) - 1
    return {
        "r2": float(1 - ((told - true) ** 2).sum() / ((true - true.mean()) ** 2).sum()),
        "spearman": float(spearmanr(told, true).statistic),
        "median": float(np.median(np.abs(relative))),
        "p90": float(np.quantile(np.abs(relative), 0.9)),
        "bias": float(np.median(relative)),
        "rows": int(chosen.sum()),
    }
