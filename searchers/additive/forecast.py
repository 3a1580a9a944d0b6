"""What gradients foretell of every level of every unit, as one table of losses with its errors.

At the uncompressed model the loss has no slope, so its curvature along the change that a level is foretells the loss.
A few sequences tell it with errors of tens of percent, but the levels of a unit are so many independent looks at how
much the model depends on it: effects are smoothed towards unit times level, as far as the errors explain the rest.
At an assignment the slope of the loss is there too. It holds the cross terms between units, all of them at once,
which a low-rank estimate of the curvature of few sequences drowns in noise.
"""

from __future__ import annotations

import numpy as np

from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.model import Array

UNKNOWN = 0.5  # relative variance of one sequence's curvature, where a single one was read
BEND = 0.5  # relative error of what the curvature at the uncompressed model says of a move elsewhere
SCALES = (0.5, 4.0)  # of the curvature, that are believed
BORROWED = 4  # sequences' worth of the noise that slopes of the same curvature have
DRIFT = 0.02  # relative error, a changed unit, of what a slope says after the reference has moved


def smoothed(curvatures: Array, space: CompressionSpace) -> Array:
    """Mean curvature of each unit's levels (units x levels, nats a token), smoothed on a log scale.

    log e[u, l] is taken as a[u] + b[role of u, l] + a deviation whose variance, the level's own, is what the errors
    of e do not explain.

    Args:
        curvatures: of every sequence, sequences x units x levels; NaN where a unit has fewer levels.
    """
    count = len(curvatures)
    mean = curvatures.mean(axis=0)
    known = np.isfinite(mean) & (mean > 0)
    values = np.where(known, mean, 1.0)
    variance = np.where(known, curvatures.var(axis=0, ddof=1) if count > 1 else np.zeros_like(mean), 0.0)
    relative = np.where(known, variance, 0.0) / np.square(values)
    error = max(float(np.median(relative[known])) if known.any() and count > 1 else UNKNOWN, 1e-12) / count
    logs = np.log(values)
    roles = np.unique([unit.role for unit in space.units], return_inverse=True)[1]
    fit = _unit_and_level(logs, known, roles)
    beyond = np.where(known, np.square(logs - fit), 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1) - error
    trust = np.maximum(beyond, 0.0) / (np.maximum(beyond, 0.0) + error)
    return np.asarray(np.where(known, np.exp(fit + trust * (logs - fit)), mean))


def _unit_and_level(logs: Array, known: Array, roles: Array) -> Array:
    """The least-squares a[u] + b[role, l] by alternation; exact after one round where all levels are known."""
    fit = np.zeros_like(logs)
    for _ in range(5):
        fit += np.where(known, logs - fit, 0).sum(axis=1, keepdims=True) / np.maximum(known.sum(axis=1), 1)[:, None]
        for role in range(int(roles.max()) + 1):
            of = roles == role
            fit[of] += np.where(known, logs - fit, 0)[of].sum(axis=0) / np.maximum(known[of].sum(axis=0), 1)
    return fit


class Forecast:
    """Collects passes, and tells what they say together, seen from any assignment.

    Args:
        space: whose levels are foretold.
    """

    def __init__(self, space: CompressionSpace) -> None:
        self.space = space
        self._rows = np.arange(len(space))
        self._base: list[Sensitivities] = []
        self._slopes: list[Sensitivities] = []
        self._curvature: Array | None = None
        self._alike: Array | None = None

    def __len__(self) -> int:
        return len(self._base) + len(self._slopes)

    def add(self, found: Sensitivities) -> None:
        """Takes in a pass: curvature at the uncompressed model, or the slope at an assignment."""
        if found.kind == "kl":
            self._slopes.append(found)
            return
        self._base.append(found)
        self._curvature = smoothed(np.concatenate([each.curvatures() for each in self._base]), self.space)
        p = np.nan_to_num(np.concatenate([each.projections for each in self._base]).astype(float))
        inner = np.einsum("sul,sum->lm", p, p)
        size = np.sqrt(np.maximum(np.diag(inner), 1e-300))
        self._alike = inner / size / size[:, None]

    def curvature(self, centre: Assignment | None) -> Array:
        """Half the squared length of every change from the centre's levels, in the metric of the curvature."""
        assert self._curvature is not None
        assert self._alike is not None
        if centre is None:
            return self._curvature
        at = list(centre)
        own = self._curvature[self._rows, at][:, None]
        apart = self._curvature + own - 2 * self._alike[at] * np.sqrt(self._curvature * own)
        apart[self._rows, at] = 0.0
        return np.asarray(np.maximum(apart, 0.0))

    def table(self, centre: Assignment) -> Array:
        """Change of the loss when one unit alone moves from the centre (units x levels, nats a token)."""
        assert self._curvature is not None
        at = list(centre)
        scale = float(np.mean([self._scale(slope) for slope in self._slopes])) if self._slopes else 1.0
        own = self._curvature[self._rows, at][:, None]
        size = scale * (self._curvature + own)
        weight = 1.0 / np.square(BEND * np.where(size > 0, size, 1.0))
        total, weights = weight * scale * (self._curvature - own), weight
        for slope in self._slopes:
            assert slope.reference is not None
            bend = scale * self.curvature(slope.reference)
            told = slope.effects() + bend
            told -= told[self._rows, at][:, None]
            moved = sum(a != b for a, b in zip(centre, slope.reference, strict=True))
            weight = 1.0 / (_noise(slope, bend) + np.square(DRIFT * moved * size) + 1e-30)
            total, weights = total + weight * told, weights + weight
        found = np.asarray(total / weights)
        found[self._rows, at] = 0.0
        return found

    def _scale(self, slope: Sensitivities) -> float:
        """How many times the curvature at the uncompressed model the loss bends at the slope's reference.

        Any move takes the present change of a unit back. Were the loss quadratic with units apart, its slope would be
        twice the curvature along that; the regression of all slopes on this says how far it is from that (1.6 at
        SmolLM2's 3 bits).
        """
        assert self._curvature is not None
        assert slope.reference is not None
        own = self._curvature[self._rows, list(slope.reference)][:, None]
        back = self.curvature(slope.reference) + own - self._curvature  # zero at the reference's own levels
        back[self._rows, list(slope.reference)] = 0.0
        known = np.isfinite(back)
        squares = float(np.square(back[known]).sum())
        found = -float((slope.effects() * back)[known].sum()) / squares if squares else 1.0
        return float(np.clip(found, *SCALES))


def _noise(slope: Sensitivities, curvature: Array) -> Array:
    """Variance of a slope by the choice of sequences; few sequences borrow from what slopes of this curvature vary."""
    count, told = len(slope.projections), slope.effects()
    own = np.square(told) if count == 1 else slope.noise()  # of a single one nothing is known but its size
    known = np.isfinite(own) & (curvature > 0)
    share = float(np.median(own[known] / curvature[known])) if known.any() else 0.0
    return (max(count - 1, 1) * own + BORROWED * share * curvature) / (max(count - 1, 1) + BORROWED)
