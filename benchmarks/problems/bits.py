"""Three bits a weight: the space of SmolLM2's 210 linear layers, and which of its assignments are measured."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit

SIZES = {  # weights of each linear layer of a block
    "self_attn.q_proj": 331776,
    "self_attn.k_proj": 110592,
    "self_attn.v_proj": 110592,
    "self_attn.o_proj": 331776,
    "mlp.gate_proj": 884736,
    "mlp.up_proj": 884736,
    "mlp.down_proj": 884736,
}
BLOCKS, BITS = 30, (2, 3, 4, 5, 6)


def bits_space(average: float = 3.0) -> CompressionSpace:
    """The 210 linear layers of SmolLM2-135M at 2 to 6 bits, ``average`` bits a weight at most."""
    units = [
        Unit(
            f"model.layers.{block}.{role}",
            costs=tuple(bits * size for bits in BITS),
            levels=tuple(map(str, BITS)),
            size=size,
        )
        for block in range(BLOCKS)
        for role, size in SIZES.items()
    ]
    return CompressionSpace.from_average(units, average, resources=("bits",))


def random_design(space: CompressionSpace, seed: int, count: int) -> list[Assignment]:
    """Assignments to measure before anything is known: uniform, exchanges around it, and a few of the whole space.

    Most exchanges prefer some roles and depths to others (drawn anew for each), as the outcomes of searches do. Half
    leave the first blocks alone: those share their run with uniform and cost less.
    """
    rng = np.random.default_rng([seed, 7])
    start = space.uniform()
    found = dict.fromkeys([start])
    while len(found) < count:
        if rng.random() < 0.08:
            found[space.sample(rng)] = None
            continue
        first = 0 if rng.random() < 0.5 else 7 * int(rng.integers(5, BLOCKS - 4))
        changes = round(float(np.exp(rng.uniform(0, np.log(60)))))
        lowered, raised = (_weights(rng, first, spread) for spread in [float(rng.choice([0.0, 1.0, 2.0]))] * 2)
        found[exchanged(space, start, changes, rng, lowered, raised)] = None
    return list(found)


def exchanged(
    space: CompressionSpace, start: Assignment, changes: int, rng: Generator, lowered: np.ndarray, raised: np.ndarray
) -> Assignment:
    """``changes`` units a step lower, then others raised a step at a time until the budget is spent.

    Args:
        lowered, raised: how readily each unit is chosen; units with weight 0 are never changed.
    """
    cursor = space.knapsack.cursor(start)
    down = {unit for unit in _order(rng, lowered)[:changes] if cursor.can(unit, -1)}
    for unit in down:
        cursor.step(unit, -1)
    for _ in range(3):
        cursor.spend(unit for unit in _order(rng, raised) if unit not in down)
    return space.check(cursor.levels)


def _weights(rng: Generator, first: int, spread: float) -> np.ndarray:
    """Log-normal preferences of roles and of five stretches of blocks; units before ``first`` are left out."""
    count = BLOCKS * len(SIZES)
    units = np.arange(count)
    roles, stretches = rng.normal(0, spread, len(SIZES)), rng.normal(0, spread, 5)
    weights = np.exp(roles[units % len(SIZES)] + stretches[units // len(SIZES) * 5 // BLOCKS])
    weights[:first] = 0
    return np.asarray(weights)


def _order(rng: Generator, weights: np.ndarray) -> list[int]:
    """Units in random order, those of larger weight rather first; without those of weight 0."""
    keys = rng.exponential(size=len(weights)) / np.maximum(weights, 1e-300)
    return [int(u) for u in np.argsort(keys) if weights[u] > 0]
