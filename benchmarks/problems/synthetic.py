"""Synthetic problems with the shape of compression: no model needed, the optimum known where it can be.

A unit's error falls from 1 (cheapest level) to 0 (dearest), to a quarter a level, as the error of quantization does a
bit; its sensitivity is drawn from gamma(1, 1). Every factory takes keyword settings, so that plans can sweep them.

Args:
    units, levels: of the space; levels cost 1, 2, ... a weight.
    tightness: share of the range from the cheapest to the dearest cost that the budget does not pay, 0 to 1.
    tightest: with it the problem is a range of budgets, from this tightness to the other, and asks for a front.
    unequal: units have the sizes of a decoder block's seven layers in turn (as for grouped-query attention), else 1.
    exact: the whole budget must be spent (floor = budget).
    structure: how much sensitivities follow a unit's role and block (standard deviation of their log).
    interaction: standard deviation of the pairwise terms.
    seed: of the instance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.problems.noisy_problem import NoisyProblem
from benchmarks.problems.pairwise import Landscape
from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.problem import FunctionProblem
from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit
from evo_hpo.space.ranges import spanning
from searchers.additive.solvers import solve_by_dynamic_programming
from searchers.additive.sweep import sweep

__all__ = ["Landscape", "NoisyProblem", "additive", "interacting", "needle", "noisy", "non_monotone", "synthetic_space"]

PATTERN = (3, 1, 1, 3, 8, 8, 8)  # sizes of one block's units, as in a decoder block with grouped-query attention
LARGEST = 1_000_000  # levels of all units together
LOUDEST = 50  # standard deviation of what is drawn
BRUTE = 150_000  # assignments up to which the optimum is found by enumeration


def synthetic_space(
    units: int = 30,
    levels: int = 5,
    tightness: float = 0.6,
    unequal: bool = False,
    exact: bool = False,
    tightest: float | None = None,
) -> CompressionSpace:
    """Units of equal step costs, or of unequal size, under one budget or over a range.

    Raises:
        InvalidSettingError: a setting outside its range.
    """
    if not (units >= 1 and levels >= 2 and units * levels <= LARGEST and 0 <= tightness <= 1):
        raise InvalidSettingError(
            f"units={units}, levels={levels}, tightness={tightness}: need at least 1 unit, 2 levels, tightness in 0..1,"
            f" and units x levels at most {LARGEST}"
        )
    if tightest is not None:
        if exact or not tightness < tightest <= 1:
            raise InvalidSettingError(
                f"tightest={tightest} must be above tightness={tightness} and at most 1, and not with exact"
            )
        return spanning(*(synthetic_space(units, levels, share, unequal) for share in (tightness, tightest)))
    sizes = [PATTERN[i % len(PATTERN)] if unequal else 1 for i in range(units)]
    made = [
        Unit(
            name=f"layers.{i // len(PATTERN)}.role{i % len(PATTERN)}",
            costs=tuple(size * (k + 1) for k in range(levels)),
            size=size,
        )
        for i, size in enumerate(sizes)
    ]
    least, most = sum(sizes), sum(sizes) * levels
    budget = least + round((most - least) * (1 - tightness))
    return CompressionSpace(made, budget, floor=budget if exact else 0)


def _errors(space: CompressionSpace) -> np.ndarray[Any, Any]:
    levels = len(space.units[0].costs)
    last = 4.0 ** (1 - levels)
    return np.tile((4.0 ** -np.arange(levels) - last) / (1 - last), (len(space), 1))


def _sensitivities(space: CompressionSpace, rng: np.random.Generator, structure: float) -> np.ndarray[Any, Any]:
    """Gamma(1, 1), larger for larger units; ``structure``: log-scale effect of the unit's role and of its block."""
    roles, blocks = rng.normal(size=len(PATTERN)), rng.normal(size=len(space) // len(PATTERN) + 1)
    index = np.arange(len(space))
    own = rng.gamma(1.0, 1.0, len(space))
    sizes = np.array([u.size for u in space.units], dtype=float)
    shared = structure * (roles[index % len(PATTERN)] + blocks[index // len(PATTERN)])
    return np.asarray(own * np.exp(shared) * sizes / sizes.mean())


def _random(seed: int, stream: int, structure: float = 0.0, interaction: float = 0.0) -> np.random.Generator:
    """What a problem is drawn with.

    Raises:
        InvalidSettingError: a negative seed, or a spread outside its range.
    """
    if seed < 0 or not 0 <= structure <= LOUDEST or not 0 <= interaction <= LOUDEST:
        given = f"structure={structure} and interaction={interaction}"
        raise InvalidSettingError(f"seed={seed} must not be negative, {given} be 0 to {LOUDEST}")
    return np.random.default_rng([seed, stream])


def _problem(space: CompressionSpace, landscape: Landscape, name: str) -> FunctionProblem:
    problem = FunctionProblem(space, landscape, name)
    if landscape.pairs is None or not landscape.pairs.any():
        best = solve_by_dynamic_programming(space, landscape.effects())
        problem.optimum = None if best is None else landscape(best)
        if space.ranged:
            problem.optima = tuple((space.cost(a), landscape(a)) for a in sweep(space, landscape.effects()))
    elif space.count() <= BRUTE:
        losses = landscape.of_many(_assignments(space))
        problem.optimum = float(losses.min())
        if space.ranged:
            costs = map(space.cost, _assignments(space).tolist())
            problem.optima = _least(zip(costs, losses.tolist(), strict=True))
    return problem


def _least(points: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """The points that lose less than all cheaper ones."""
    ordered = sorted(points)
    before = itertools.accumulate((loss for _, loss in ordered), min, initial=math.inf)
    return tuple(point for point, least in zip(ordered, before, strict=False) if point[1] < least)


@lru_cache(maxsize=4)
def _assignments(space: CompressionSpace) -> np.ndarray[Any, Any]:
    """All of them (assignments x units); seeds share their space."""
    return np.array(list(space.enumerate()), dtype=np.int8)


@lru_cache(maxsize=64)
def additive(
    units: int = 30,
    levels: int = 5,
    tightness: float = 0.6,
    unequal: bool = False,
    exact: bool = False,
    tightest: float | None = None,
    structure: float = 0.0,
    seed: int = 0,
) -> FunctionProblem:
    """Sum of independent unit losses; the optimum is exact, by dynamic programming."""
    space = synthetic_space(units, levels, tightness, unequal, exact, tightest)
    rng = _random(seed, 1, structure)
    return _problem(space, Landscape(_errors(space), _sensitivities(space, rng, structure), None), "additive")


@lru_cache(maxsize=64)
def interacting(
    units: int = 30,
    levels: int = 5,
    tightness: float = 0.6,
    unequal: bool = False,
    exact: bool = False,
    tightest: float | None = None,
    structure: float = 0.0,
    interaction: float = 0.1,
    seed: int = 0,
) -> FunctionProblem:
    """Additive losses and normal pairwise terms of standard deviation ``interaction``; optimum by brute force if small.

    Two levels, 16 units, ``exact`` and tightness 0.375 is dropping 6 of 16 modules: 8008 assignments.
    """
    space = synthetic_space(units, levels, tightness, unequal, exact, tightest)
    rng = _random(seed, 2, structure, interaction)
    sensitivities = _sensitivities(space, rng, structure)
    pairs = rng.normal(0.0, interaction, (units, units))
    return _problem(space, Landscape(_errors(space), sensitivities, pairs), "interacting")


@lru_cache(maxsize=64)
def non_monotone(
    units: int = 30,
    levels: int = 5,
    tightness: float = 0.6,
    unequal: bool = False,
    exact: bool = False,
    tightest: float | None = None,
    share: float = 0.2,
    interaction: float = 0.05,
    seed: int = 0,
) -> FunctionProblem:
    """Some units are better compressed more: a share of them has one of its levels' errors swapped with the next.

    The EvoPress paper's premise (arXiv 2410.14649, section 3): dropping a superset of modules can lower the loss.

    Args:
        share: of the units that are not monotone, 0 to 1.
    """
    if not 0 <= share <= 1:
        raise InvalidSettingError(f"share={share} must be in 0..1")
    space = synthetic_space(units, levels, tightness, unequal, exact, tightest)
    rng = _random(seed, 3, interaction=interaction)
    errors = _errors(space)
    for unit in rng.permutation(units)[: math.ceil(share * units)]:
        level = int(rng.integers(levels - 1))
        errors[unit, [level, level + 1]] = errors[unit, [level + 1, level]]
    sensitivities = _sensitivities(space, rng, 0.0)
    pairs = rng.normal(0.0, interaction, (units, units)) if interaction else None
    return _problem(space, Landscape(errors, sensitivities, pairs), "non_monotone")


@lru_cache(maxsize=64)
def needle(units: int = 12, levels: int = 3, tightness: float = 0.5, radius: int = 4, seed: int = 0) -> FunctionProblem:
    """A plateau of loss 1 with one funnel: the number of level steps to a secret assignment, within ``radius``.

    Args:
        radius: level steps from which the funnel is felt.
    """
    space = synthetic_space(units, levels, tightness)
    secret = np.array(space.sample(_random(seed, 4)))

    def loss(levels: Assignment) -> float:
        return min(1.0, float(np.abs(np.array(levels) - secret).sum()) / (radius + 1))

    return FunctionProblem(space, loss, "needle", optimum=0.0)


@lru_cache(maxsize=64)
def noisy(
    units: int = 30,
    levels: int = 5,
    tightness: float = 0.6,
    unequal: bool = False,
    tightest: float | None = None,
    structure: float = 0.0,
    interaction: float = 0.05,
    noise: float = 0.3,
    tokens: int = 1024,
    sensitivities: str = "noisy",
    delay: float = 0.0,
    seed: int = 0,
) -> NoisyProblem:
    """The interacting problem with minibatches: a loss depends on the data, less so with more tokens.

    Args:
        noise: standard deviation of a unit's factor on 1024 tokens.
        tokens: of a trial that names none.
        sensitivities: ``exact``, ``noisy`` as those of a model are, or ``misleading``.
        delay: seconds that scoring an assignment takes, to try schedules with; 0 to 3600.
    """
    if not 0 <= delay <= 3600 or not 0 <= noise <= LOUDEST or tokens < 1:
        given = f"delay={delay} must be 0 to 3600 seconds, noise={noise} 0 to {LOUDEST}"
        raise InvalidSettingError(f"{given}, tokens={tokens} at least 1")
    base = interacting(
        *(units, levels, tightness, unequal, False, tightest), structure=structure, interaction=interaction, seed=seed
    )
    assert isinstance(base.function, Landscape)
    problem = NoisyProblem(
        base.space,
        base.function,
        noise=noise,
        tokens=tokens,
        optimum=base.optimum,
        sensitivities=sensitivities,
        delay=delay,
    )
    problem.optima = base.optima
    return problem
