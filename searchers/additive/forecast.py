"""What gradients foretell of every level of every unit, as one table of losses with its errors.

At the uncompressed model the loss has no slope, so its curvature along the change that a level is foretells the loss.
A few sequences tell it with errors of tens of percent, but the levels of a unit are so many independent looks at how
much the model depends on it: effects are smoothed towards unit times level, as far as the errors explain the rest.
At an assignment the slope of the loss is there too. It holds the cross terms between units, all of them at once,
which a low-rank estimate of the curvature of few sequences drowns in noise.

Where units are removed, no change is small, and the curvature at the uncompressed model can be wrong by a factor of its
own for each: a module may bend the loss next to nothing and be missed all the same. Each removed unit's own slope shows
its factor, and the others' is seen where those are removed in its place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.space.compression_space import Assignment, CompressionSpace
from searchers.additive.model import Array

UNKNOWN = 0.5  # relative variance of one sequence's curvature, where a single one was read
BEND = 0.5  # relative error of what the curvature at the uncompressed model says of a move elsewhere
SCALES = (0.5, 4.0)  # of the curvature, that are believed
BORROWED = 4  # sequences' worth of the noise that slopes of the same curvature have
SPREAD = 0.7  # of the logarithm of what is left of a removed unit's curvature, as its own slope shows it
MISFIT = 0.3  # relative error of what one slope shows of it, beside its noise
OTHERS = 10.0  # times its curvature, that a unit which has shown its own counts where others are to be seen
AWAY = 1.5  # times what the removed units show, that the loss bends when a further one is removed
FEW = 3  # removed units, from which on one can be told to have ruined the model
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


def removes(space: CompressionSpace) -> bool:
    """Whether units are only kept or left out; some may have no choice."""
    chosen = [costs for costs in space.vectors if len(costs) > 1]
    return bool(chosen) and all(len(costs) == 2 and sum(any(cost) for cost in costs) == 1 for costs in chosen)


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
        self.removes = removes(space)
        self._kept = np.array([len(costs) - 1 if any(costs[-1]) else 0 for costs in space.vectors])
        self._measured: Array | None = None
        self._ruined = np.ones((len(space), 1))
        self._own = np.ones((len(space), 1))
        self._alike: Array | None = None

    def __len__(self) -> int:
        return len(self._base) + len(self._slopes)

    @property
    def shows(self) -> bool:
        """Whether a slope has told anything."""
        return len(self._slopes) > 0

    @property
    def _curvature(self) -> Array | None:
        return None if self._measured is None else self._measured * self._ruined * self._own

    def add(self, found: Sensitivities) -> None:
        """Takes in a pass: curvature at the uncompressed model, or the slope at an assignment.

        Of a slope where a removed unit has ruined the model only that is kept: the unit's curvature is raised.
        """
        if found.kind == "kl":
            if self.removes and (ruined := self._ruined_by(found)):
                for unit, times in ruined.items():
                    self._ruined[unit] *= times
                return
            self._slopes.append(found)
            if self.removes:
                self._own = self._own_scales()
            return
        self._base.append(found)
        self._measured = smoothed(np.concatenate([each.curvatures() for each in self._base]), self.space)
        p = np.nan_to_num(np.concatenate([each.projections for each in self._base]).astype(float))
        inner = np.einsum("sul,sum->lm", p, p)
        size = np.sqrt(np.maximum(np.diag(inner), 1e-300))
        self._alike = inner / size / size[:, None]

    def curvature(self, centre: Assignment | None, away: float = 1.0) -> Array:
        """Half the squared length of every change from the centre's levels, in the metric of the curvature.

        ``away``: times :data:`AWAY`, see :meth:`table`.
        """
        assert self._curvature is not None
        assert self._alike is not None
        if centre is None:
            return self._curvature
        at = list(centre)
        own = self._curvature[self._rows, at][:, None]
        apart = self._curvature + own - 2 * self._alike[at] * np.sqrt(self._curvature * own)
        if self.removes:
            apart[self._kept == at] *= AWAY * away
        apart[self._rows, at] = 0.0
        return np.asarray(np.maximum(apart, 0.0))

    def table(self, centre: Assignment, rng: np.random.Generator | None = None, away: float = 1.0) -> Array:
        """Change of the loss when one unit alone moves from the centre (units x levels, nats a token).

        Args:
            centre: the assignment that moves start from.
            rng: None: what is expected; else a draw of what may be, by the errors of all that was told.
            away: times what is expected, that the loss bends when a further unit is removed: one number for all, which
                no pass tells.
        """
        assert self._curvature is not None
        at = list(centre)
        common = self._slopes and not self.removes
        scale = float(np.mean([self._scale(slope) for slope in self._slopes])) if common else 1.0
        own = self._curvature[self._rows, at][:, None]
        size = scale * (self._curvature + own)
        weight = 1.0 / np.square(BEND * np.where(size > 0, size, 1.0))
        total, weights = weight * scale * (self._curvature - own), weight
        for slope in self._slopes:
            assert slope.reference is not None
            bend = scale * self.curvature(slope.reference, away)
            told = slope.effects() + bend
            told -= told[self._rows, at][:, None]
            moved = sum(a != b for a, b in zip(centre, slope.reference, strict=True))
            weight = 1.0 / (_noise(slope, bend) + np.square(DRIFT * moved * size) + 1e-30)
            total, weights = total + weight * told, weights + weight
        found = np.asarray(total / weights)
        if rng is not None:
            found += np.where(size > 0, rng.normal(size=found.shape) / np.sqrt(weights), 0.0)
        found[self._rows, at] = 0.0
        return found

    def elsewhere(self, centre: Assignment) -> Array:
        """As :meth:`table`, but with staying removed made dear: its solution is where other units show themselves."""
        found, at = self.table(centre), np.array(centre)
        assert self._curvature is not None
        gone = at != self._kept
        found[gone, at[gone]] += OTHERS * np.nan_to_num(self._curvature[self._rows, at][gone])
        return found

    def _removed(self, slope: Sensitivities) -> tuple[NDArray[np.intp], Array, Array, Array]:
        """Units left out at a slope's reference, what taking each back would gain, its error, and their curvature."""
        assert self._measured is not None
        assert slope.reference is not None
        at, gains = np.array(slope.reference), -slope.effects()
        own = (self._measured * self._ruined)[self._rows, at]
        units = np.flatnonzero((at != self._kept) & (own > 0) & np.isfinite(gains[self._rows, self._kept]))
        gain = gains[units, self._kept[units]]
        noise = np.abs(gain) if len(slope.projections) == 1 else np.sqrt(slope.noise()[units, self._kept[units]])
        return units, gain, noise, own[units]

    def _ruined_by(self, slope: Sensitivities) -> dict[int, float]:
        """Units whose change has ruined the model, and how many times too small their curvature is.

        Were the loss quadratic, taking a change back would gain about twice its curvature, times one number for all.
        So none does more harm than all together would gain; where one does, the slope says nothing of any other unit.
        """
        units, gain, noise, own = self._removed(slope)
        most = max(float(np.median(gain / own)), 2.0) * float(own.sum()) if len(units) else 0.0
        rows = zip(units, gain, noise, own, strict=True)
        return {int(u): -g / c / 2 for u, g, n, c in rows if g + n < -most and len(units) >= FEW}

    def _own_scales(self) -> Array:
        """How many times its curvature each unit bends the loss (units x 1): what its slopes show, else the typical."""
        shown = [self._removed(slope) for slope in self._slopes]
        units, gain, noise, own = (np.concatenate(each) for each in zip(*shown, strict=True))
        if not len(units):
            return np.ones_like(self._own)
        logs = np.log(np.clip(np.abs(gain) / 2 / own, 1e-3, 1e3))
        typical = float(np.median(logs))
        variance = np.square(np.minimum(noise / np.maximum(np.abs(gain), 1e-12), 2.0)) + MISFIT**2
        found = np.full_like(self._own, typical)
        for unit in np.unique(units):
            those = units == unit
            trust = SPREAD**2 / (SPREAD**2 + float(variance[those].mean()) / int(those.sum()))
            found[unit] += trust * (float(logs[those].mean()) - typical)
        return np.asarray(np.exp(found))

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
