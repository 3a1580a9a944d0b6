"""An additive model of the loss, fitted to measured feasible assignments.

A loss is modelled as the sum of one effect for each unit's level. Raising a single unit breaks a tight budget, so
effects cannot be read off one by one: rows are differences between feasible assignments, and a Bayesian ridge
regression takes them apart. Its prior shares strength between the steps of a unit, the units of one role, the units of
one block, and all units, so that far fewer rows than effects are of use; the weights of these parts, the decay of
effects from level to level and the noise are chosen by the marginal likelihood of the rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import Generator
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.lapack import dpotrf, dpotrs

from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.solvers import Effects, solve_by_dynamic_programming, solve_by_integer_programming

__all__ = ["AdditiveModel", "Effects", "solve_by_dynamic_programming", "solve_by_integer_programming", "within_reach"]

Array = np.ndarray[Any, np.dtype[Any]]

# Shares of the prior variance: own step, all steps of the unit, role, block, all units.
SHARES = ((0.6, 0.35, 0.0, 0.0, 0.05), (0.3, 0.3, 0.15, 0.15, 0.1), (0.1, 0.2, 0.3, 0.2, 0.2))
DECAYS = (0.25, 0.5, 1.0)  # size of a step's effect against the step below
NOISES = (1e-8, 1e-3, 1e-2, 0.1, 1.0)  # variance of a one-unit row's misfit, in prior variances of a step


class AdditiveModel:
    """Posterior over the loss of every unit's levels, from measured differences.

    Args:
        space: whose levels have effects.
        memory: rows kept for the fit, those nearest to the assignment that it is made for.
        outlier: differences above this multiple of the median are cut to it: that a level ruins the model matters, not
            how much.
    """

    def __init__(self, space: CompressionSpace, *, memory: int = 600, outlier: float = 20.0) -> None:
        self.space = space
        self.memory = memory
        self.outlier = outlier
        steps = [(u, k) for u in range(len(space)) for k in range(space.lowest[u] + 1, space.highest[u] + 1)]
        self._unit = np.array([u for u, _ in steps], dtype=int)
        self._step = np.array([k for _, k in steps], dtype=int)
        self._parts = self._make_parts(steps)
        self._levels: list[Assignment] = []
        self._references: list[Assignment] = []
        self._differences: list[float] = []
        self._weights_of_rows: list[float] = []
        self._choice: tuple[Sequence[float], float, float] = (SHARES[1], DECAYS[1], 1e-2)
        self._tuned_at = 0

    def __len__(self) -> int:
        return len(self._differences)

    def _make_parts(self, steps: Sequence[tuple[int, int]]) -> list[Array]:
        """For each part of the prior, the index of the shared effect that each step belongs to."""
        units = self.space.units
        keys: list[list[Any]] = [
            list(steps),
            [u for u, _ in steps],
            [(units[u].role, k) for u, k in steps],
            [(units[u].block, k) for u, k in steps],
            [k for _, k in steps],
        ]
        parts = []
        for key in keys:
            index = {value: i for i, value in enumerate(dict.fromkeys(key))}
            parts.append(np.array([index[value] for value in key], dtype=int))
        return parts

    def add(self, levels: Assignment, reference: Assignment, difference: float, weight: float = 1.0) -> None:
        """One row: loss of ``levels`` less loss of ``reference`` on the same minibatch; not finite rows are ignored.

        Args:
            weight: how many rows of plain noise it is worth, for example those whose mean it is.
        """
        if np.isfinite(difference) and levels != reference:
            self._levels.append(levels)
            self._references.append(reference)
            self._differences.append(difference)
            self._weights_of_rows.append(weight)

    def fit(self, centre: Assignment) -> None:
        """Fits the rows nearest to ``centre``; rows of more changed units count less, as they hold interactions."""
        levels, references = np.array(self._levels, dtype=np.int16), np.array(self._references, dtype=np.int16)
        at = np.array(centre, dtype=np.int16)
        changed = (levels != references).sum(axis=1)
        distance = np.minimum((levels != at).sum(axis=1), (references != at).sum(axis=1))
        spread = changed + 0.5 * distance
        kept = np.argsort(spread, kind="stable")[: self.memory]
        levels, references = levels[kept], references[kept]
        self._spread = np.maximum(spread[kept], 1.0) / np.array(self._weights_of_rows)[kept]
        values = np.array(self._differences)[kept]
        limit = self.outlier * float(np.median(np.abs(values)))
        self._values = np.clip(values, -limit, limit) if limit else values
        features = (levels[:, self._unit] >= self._step).astype(float)
        features -= references[:, self._unit] >= self._step
        self._features = features
        if len(self) >= 2 * self._tuned_at or len(self) < 16:
            self._tune()
            self._tuned_at = len(self)
        self._solve(*self._choice)

    def _hypotheses(self) -> Sequence[Sequence[float]]:
        """The shares that are tried."""
        return SHARES

    def _expand(self, shares: Sequence[float], decay: float) -> tuple[Array, Array]:
        """Scale of each step's effect, and the features of all parts of the prior side by side."""
        scale = decay ** (self._step - self._step.min())
        scaled = self._features * scale
        parts = []
        for share, part in zip(shares, self._parts, strict=True):
            if share:
                summed = np.zeros((len(scaled), int(part.max()) + 1))
                np.add.at(summed.T, part, scaled.T)
                parts.append(np.sqrt(share) * summed)
        return scale, np.concatenate(parts, axis=1)

    def _tune(self) -> None:
        """Shares, decay and noise of the largest marginal likelihood; the overall scale has a closed form."""
        best = -np.inf
        count, diagonal = len(self._values), np.arange(len(self._values))
        for shares, decay in itertools.product(self._hypotheses(), DECAYS):
            _, expanded = self._expand(shares, decay)
            kernel = expanded @ expanded.T
            for noise in NOISES:  # LAPACK itself: of small matrices, the checks around it take most of the time
                noisy = kernel.copy()
                noisy[diagonal, diagonal] += noise * self._spread + 1e-10
                factor, failed = dpotrf(noisy, lower=True, clean=False)
                if failed:
                    raise np.linalg.LinAlgError("the covariance of the measured differences is not positive definite")
                weighted = self._values @ dpotrs(factor, self._values, lower=True)[0]
                evidence = -0.5 * count * np.log(max(weighted, 1e-300)) - np.log(factor[diagonal, diagonal]).sum()
                if evidence > best + 1e-9:
                    best, self._choice = evidence, (shares, decay, noise)

    def _solve(self, shares: Sequence[float], decay: float, noise: float) -> None:
        self._shares = shares
        self._scale, self._expanded = self._expand(shares, decay)
        self._noise = noise * self._spread + 1e-10
        self._factor = cho_factor(self._expanded @ self._expanded.T + np.diag(self._noise), lower=True)
        alpha = cho_solve(self._factor, self._values)
        self._variance = float(self._values @ alpha) / len(self._values)
        self._weights = self._expanded.T @ alpha

    def effects(self, rng: Generator | None = None) -> list[list[float]]:
        """Loss of each unit's levels above its lowest level: the posterior mean, or a draw from the posterior."""
        weights = self._weights
        if rng is not None:
            prior = rng.normal(size=len(weights))
            noise = rng.normal(size=len(self._noise)) * np.sqrt(self._noise)
            moved = self._expanded.T @ cho_solve(self._factor, self._expanded @ prior + noise)
            weights = weights + np.sqrt(self._variance) * (prior - moved)
        return self._read(weights)

    def _read(self, weights: Array) -> list[list[float]]:
        steps = self._steps(self._shares, self._scale, weights)
        found = [[0.0] * len(u.costs) for u in self.space.units]
        for u, k, effect in zip(self._unit.tolist(), self._step.tolist(), steps.tolist(), strict=True):
            found[u][k] = found[u][k - 1] + effect
        return found

    def _steps(self, shares: Sequence[float], scale: Array, weights: Array) -> Array:
        """Effect of each step from the weights of all parts, which stand side by side as in :meth:`_expand`."""
        steps = np.zeros(len(self._unit))
        offset = 0
        for share, part in zip(shares, self._parts, strict=True):
            if share:
                size = int(part.max()) + 1
                steps += np.sqrt(share) * weights[offset : offset + size][part]
                offset += size
        steps *= scale
        return steps


def within_reach(effects: list[list[float]], centre: Assignment, reach: int | None) -> list[list[float]]:
    """The effects with levels more than ``reach`` from the centre's at infinity, so that no solution takes them."""
    if reach is None:
        return effects
    return [
        [e if abs(k - at) <= reach else math.inf for k, e in enumerate(unit)]
        for unit, at in zip(effects, centre, strict=True)
    ]
