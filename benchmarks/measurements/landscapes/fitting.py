"""Fits the surrogate to measured losses, and says how far it is off."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from benchmarks.problems.surrogate import Array, Features, Fit

NONE = -60.0
"""Logarithm of the weight of interactions where there are none."""


def fit(features: Features, levels: NDArray[np.integer[Any]], losses: Array, settings: Array) -> Fit:
    """The process given measured losses.

    Args:
        levels: assignments x units.
        losses: mean KL of each, nats a token.
        settings: logarithms of the hyperparameters, as :func:`optimise` returns them.
    """
    weights, interaction, noise = _unpack(features, settings)
    x, y = features.rows(levels), np.log(losses)
    linear = features.covariance(x, x, weights)
    kernel = linear + interaction * linear**2 + noise * np.eye(len(y))
    alpha, mean = _solve(kernel, y)
    smooth = np.stack(  # of each row, features x units: prior covariance with every unit's effect
        [x[:, f] @ sum(w * p for w, p in zip(weights[f], features.parts, strict=True)) for f in range(x.shape[1])], 1
    ).reshape(len(y), -1)
    return Fit(features, mean, alpha @ smooth, interaction * (smooth * alpha[:, None]).T @ smooth)


def optimise(
    features: Features,
    levels: NDArray[np.integer[Any]],
    losses: Array,
    start: Array | None = None,
    steps: int = 30,
    interactions: bool = True,
) -> Array:
    """Hyperparameters of the largest marginal likelihood, by L-BFGS with exact gradients.

    Args:
        levels, losses: as for :func:`fit`.
        start: hyperparameters to begin with.
        steps: iterations at most.
        interactions: False: additive in log KL.

    Returns:
        Logarithms of: the parts' weights (features x parts), the weight of interactions, the noise variance.
    """
    x, y = features.rows(levels), np.log(losses)
    count = x.shape[1] * len(features.parts)
    grams = [x[:, f] @ part @ x[:, f].T for f in range(x.shape[1]) for part in features.parts]
    guess = np.array([*[-3.0] * count, -2.0, -7.0]) if start is None else start

    def objective(settings: Array) -> tuple[float, Array]:
        weights, interaction, noise = np.exp(settings[:count]), np.exp(settings[-2]), np.exp(settings[-1])
        linear = sum(w * g for w, g in zip(weights, grams, strict=True))
        kernel = linear + interaction * linear**2 + noise * np.eye(len(y))
        try:
            factor = cho_factor(kernel, lower=True)
        except np.linalg.LinAlgError:
            return 1e12, np.zeros_like(settings)
        ones = np.ones(len(y))
        weighed = cho_solve(factor, ones)
        residual = y - (weighed @ y) / (weighed @ ones)
        alpha = cho_solve(factor, residual)
        inverse = cho_solve(factor, np.eye(len(y)))
        slope = 0.5 * (inverse - np.outer(alpha, alpha))
        through = slope * (1 + 2 * interaction * linear)
        gradient = [w * float((through * g).sum()) for w, g in zip(weights, grams, strict=True)]
        gradient += [interaction * float((slope * linear**2).sum()), noise * float(np.trace(slope))]
        value = 0.5 * float(residual @ alpha) + float(np.log(np.diag(factor[0])).sum())
        return value, np.array(gradient)

    found = minimize(
        objective,
        guess,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": steps},
        bounds=[(-14.0, 4.0)] * count + [(-8.0, 3.0) if interactions else (NONE, NONE), (-14.0, 0.0)],
    )
    return np.asarray(found.x)


def _unpack(features: Features, settings: Array) -> tuple[Array, float, float]:
    weights = np.exp(settings[:-2]).reshape(-1, len(features.parts))
    return weights, float(np.exp(settings[-2])), float(np.exp(settings[-1]))


def _solve(kernel: Array, y: Array) -> tuple[Array, float]:
    """Weights of the rows, and the mean by generalised least squares."""
    factor = cho_factor(kernel, lower=True)
    weighed = cho_solve(factor, np.ones(len(y)))
    mean = float((weighed @ y) / weighed.sum())
    return np.asarray(cho_solve(factor, y - mean)), mean
