"""A smooth function through measured assignments: what the landscape says where nothing was measured.

A Gaussian process on the logarithm of the KL divergence. Each unit's level has two features: its quantization energy
4^(3 - bits), relative to 3 bits, and whether it is above 3 bits. Effects of units are alike a priori when they share a
role, when their blocks are near, or both; interactions are the square of the same kernel, so that pairs of units that
matter interact. With the features known, the process is a quadratic form, which is what is evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from evo_hpo.space import Assignment, CompressionSpace

__all__ = ["Features", "Fit", "fit", "optimise"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Features:
    """Features of every unit's levels, and how alike two units are a priori.

    Attributes:
        table: units x levels x features.
        parts: covariances of unit effects (units x units) that hyperparameters weigh: all alike, same role, near
            blocks, both, each its own.
    """

    table: Array
    parts: tuple[Array, ...]

    @classmethod
    def of(cls, space: CompressionSpace) -> Features:
        """From levels that are bits, and names that give block and role."""
        bits = np.array([[float(label) for label in unit.levels] for unit in space.units])
        scale = np.sqrt(np.array([unit.size for unit in space.units]) / space.total_size)
        table = np.stack([4.0 ** (3 - bits) - 1, np.minimum(bits - 3, 1.0) * (bits > 3)], axis=-1)
        roles = [unit.role for unit in space.units]
        blocks = np.array([unit.block or 0 for unit in space.units])
        role = np.array([[float(a == b) for b in roles] for a in roles])
        near = np.exp(-np.abs(blocks[:, None] - blocks[None, :]) / 4.0)
        own = np.eye(len(roles))
        parts = tuple(part * np.outer(scale, scale) for part in (np.ones_like(role), role, near, role * near, own))
        return cls(table, parts)

    def rows(self, levels: NDArray[np.integer[Any]]) -> Array:
        """Features of assignments: assignments x features x units."""
        units = np.arange(self.table.shape[0])
        return np.moveaxis(self.table[units, levels], -1, 1)

    def covariance(self, first: Array, second: Array, weights: Array) -> Array:
        """Prior covariance of additive effects; ``weights``: features x parts, not negative."""
        total = np.zeros((len(first), len(second)))
        for f, of_feature in enumerate(weights):
            alike = sum(w * part for w, part in zip(of_feature, self.parts, strict=True))
            total += first[:, f] @ alike @ second[:, f].T
        return total


@dataclass(frozen=True)
class Fit:
    """A fitted process as a quadratic form: log KL = constant + linear . g + g . quadratic . g, g the features.

    Attributes:
        constant, linear, quadratic: of the flattened features (features x units).
    """

    features: Features
    constant: float
    linear: Array
    quadratic: Array

    def many(self, levels: NDArray[np.integer[Any]]) -> Array:
        """Predicted log KL of the rows of an array (assignments x units)."""
        g = self.features.rows(levels).reshape(len(levels), -1)
        return np.asarray(self.constant + g @ self.linear + ((g @ self.quadratic) * g).sum(axis=1))

    def __call__(self, assignment: Assignment) -> float:
        """Predicted KL(dense || compressed), nats a token; lower is better."""
        g = self.features.table[np.arange(len(assignment)), assignment].T.ravel()
        return float(np.exp(self.constant + g @ self.linear + g @ (self.quadratic @ g)))


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
) -> Array:
    """Hyperparameters of the largest marginal likelihood, by L-BFGS with exact gradients.

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
        bounds=[(-14.0, 4.0)] * count + [(-8.0, 3.0), (-14.0, 0.0)],
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
