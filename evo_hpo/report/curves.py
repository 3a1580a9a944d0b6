"""Anytime curves: the incumbent's held-out loss as a step function of what was spent. Lower is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evo_hpo.report.results import Results
from evo_hpo.report.search_run import SearchRun
from evo_hpo.report.statistics import FEW, Interval, spread

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A right-continuous step function: ``loss[i]`` holds from ``spent[i]`` on; before ``spent[0]`` there is none."""

    spent: Floats
    loss: Floats
    end: float
    """What the whole search spent; the last loss holds from there on if it has finished."""
    finished: bool = True

    def at(self, x: npt.ArrayLike) -> Floats:
        """Loss at each x; NaN before the first checkpoint."""
        positions = np.searchsorted(self.spent, np.asarray(x, dtype=np.float64), side="right") - 1
        padded = np.append(self.loss, np.nan)
        return np.asarray(padded[positions])


def curve(run: SearchRun, axis: str) -> Curve:
    """A search's curve over ``tokens``, ``evaluations`` or ``seconds`` from its held-out checkpoints.

    Several checkpoints at one place (a search that ended early) count once, the last of them.
    """
    found: dict[float, float] = {}
    for c in run.checkpoints:
        loss = c.held_out.get("loss", math.nan)
        if not math.isnan(loss):
            found[float(getattr(c, axis))] = loss
    spent = sorted(found)
    end = max([run.spent(axis), *spent])
    return Curve(np.array(spent), np.array([found[x] for x in spent]), end, run.finished)


@dataclass(frozen=True)
class Band:
    """Median of several curves on a grid, with bounds; ``kind`` says what the bounds are.

    ``finished``: its last values hold beyond its end, as the searches have ended.
    """

    x: Floats
    middle: Floats
    low: Floats
    high: Floats
    kind: str
    count: int
    finished: bool = True


def band(curves: Sequence[Curve], *, points: int = 200, seed: int = 0) -> Band:
    """Median over seeds, from where every seed has a value to the largest end.

    Seeds that have not finished count only where none has: then it ends where the first of them is so far. Bounds are a
    95 % bootstrap interval of the median from 5 curves on, else least and greatest.
    """
    usable = [c for c in curves if len(c.spent)]
    finished = any(c.finished for c in usable)
    usable = [c for c in usable if c.finished or not finished]
    if not usable:
        empty = np.array([])
        return Band(empty, empty, empty, empty, "none", 0)
    start, ends = max(c.spent[0] for c in usable), [c.end for c in usable]
    end = max(ends) if finished else max(start, min(ends))
    corners = np.concatenate([c.spent for c in usable])
    x = np.unique(np.concatenate([np.linspace(start, end, points), corners[(corners >= start) & (corners <= end)]]))
    values = np.array([c.at(x) for c in usable])
    middle = np.median(values, axis=0)
    if len(usable) < FEW:
        kind = "range" if len(usable) > 1 else "value"
        return Band(x, middle, values.min(axis=0), values.max(axis=0), kind, len(usable), finished)
    picks = np.random.default_rng(seed).integers(len(usable), size=(2000, len(usable)))
    low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975], axis=0)
    return Band(x, middle, low, high, "95 % bootstrap", len(usable), finished)


def area(c: Curve, budget: float, before: float) -> float:
    """Mean loss over the budget: area under the step function on [0, budget], divided by the budget.

    Args:
        c: the curve.
        budget: where the area ends; the last loss holds until there.
        before: the loss that counts before the first checkpoint, for example uniform's.
    """
    if budget <= 0:
        return math.nan
    corners = np.clip(np.concatenate([[0.0], c.spent, [max(budget, c.end)]]), 0, budget)
    return float((np.diff(corners) * np.concatenate([[before], c.loss])).sum() / budget)


def time_to(c: Curve, target: float) -> float:
    """What was spent when the loss first was at or below ``target``; inf when it never was."""
    hit = np.flatnonzero(c.loss <= target)
    return float(c.spent[hit[0]]) if len(hit) else math.inf


def expected_running_time(curves: Iterable[Curve], target: float) -> float:
    """Expected spending until the target is met, restarting a search that missed it at its end.

    All that was spent by all searches up to their hit or end, divided by the number of hits; inf without a hit.
    Source: Hansen et al., "COCO: performance assessment" (2016).
    """
    spent, hits = 0.0, 0
    for c in curves:
        time = time_to(c, target)
        hits += math.isfinite(time)
        spent += time if math.isfinite(time) else c.end
    return spent / hits if hits else math.inf


def targets(results: Results, problem: str, count: int = 51) -> Floats:
    """Losses from just below uniform's (hardest last) to the best known, evenly spaced."""
    best, width = results.scale(problem)
    return np.asarray(best + width * np.linspace(1, 0, count + 1)[1:])


def attainment(curves: Sequence[Curve], losses: Sequence[float] | Floats, x: npt.ArrayLike) -> Floats:
    """Share of all (search, target) pairs that are met when x is spent: the ECDF over targets."""
    times = np.sort([time_to(c, float(target)) for c in curves for target in losses])
    return np.asarray(np.searchsorted(times, np.asarray(x, dtype=np.float64), side="right") / max(len(times), 1))


@dataclass(frozen=True)
class SpeedUp:
    """How much sooner ``a`` reaches the final loss of ``b``: what b spent over what a needed, over common seeds.

    ``factor`` above 1: a is faster; 0 counts for a pair where a never got there. ``reached`` of ``pairs`` did.
    """

    a: str
    b: str
    factor: Interval
    reached: int
    pairs: int


def speed_up(results: Results, problem: str, a: str, b: str, axis: str = "tokens") -> SpeedUp | None:
    """Speed-up of ``a`` over ``b`` to b's final loss, pair by pair; None without common finished searches.

    As fine as the checkpoints are: a is charged up to the checkpoint at which it was first seen to be there. A search
    that stopped on its own counts with what it spent.
    """
    first, second = results.by_seed(problem, a), results.by_seed(problem, b)
    factors = []
    for seed in first:
        if seed in second and first[seed].finished and second[seed].finished:
            needed = time_to(curve(first[seed], axis), second[seed].loss)
            factors.append(curve(second[seed], axis).end / needed if 0 < needed < math.inf else 0.0)
    if not factors:
        return None
    return SpeedUp(a, b, spread(factors), sum(f > 0 for f in factors), len(factors))


def axes(results: Results, problem: str) -> tuple[str, ...]:
    """The axes that mean something: tokens where they are charged, else evaluations; and seconds."""
    charged = any(run.tokens for run in results.of(problem))
    return ("tokens" if charged else "evaluations", "seconds")
