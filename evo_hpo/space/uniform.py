"""Uniform compression: what every search starts from and has to beat."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from evo_hpo.space.repair import repair

if TYPE_CHECKING:
    from evo_hpo.space.compression_space import Assignment, CompressionSpace

__all__ = ["uniform"]


def uniform(space: CompressionSpace) -> Assignment:
    """The highest cost a weight that all units can share within the budget, one resource.

    What is left of a fractional budget raises units by one step each: every kind of unit in the same share, each kind
    spread evenly over the depth. With several resources, units are raised from their cheapest levels in that order,
    round by round, as far as every budget allows.
    """
    if space.dimensions > 1:
        levels = list(space.lowest)
        while _raise_once(space, levels):
            pass
        if not space.feasible(levels):
            levels = list(repair(space, levels))
            while _raise_once(space, levels):
                pass
        return tuple(levels)
    sizes = _sizes(space)
    ratios = sorted({Fraction(v[0], size) for size, unit in zip(sizes, space.vectors, strict=True) for v in unit})
    low, high = 0, len(ratios) - 1
    while low < high:
        middle = (low + high + 1) // 2
        affordable = space.cost(_up_to(space, sizes, ratios[middle])) <= space.budget
        low, high = (middle, high) if affordable else (low, middle - 1)
    levels = list(_up_to(space, sizes, ratios[low]))
    if space.cost(levels) > space.budget:
        levels = list(repair(space, levels))
    _raise_once(space, levels)  # also where a floor is not met yet: repair would not spread what it raises
    return tuple(levels) if space.feasible(levels) else repair(space, levels)


def _sizes(space: CompressionSpace) -> list[int]:
    """Number of weights of each unit; 1 where a level costs the same in all of them, as a dropped module does."""
    same = len(set(space.vectors)) == 1
    return [1 if same else unit.size for unit in space.units]


def _up_to(space: CompressionSpace, sizes: list[int], ratio: Fraction) -> Assignment:
    """The dearest level of each unit whose cost a weight is at most ``ratio``."""
    return tuple(
        max([k for k in range(low, high + 1) if costs[k][0] <= ratio * size], default=low)
        for size, costs, low, high in zip(sizes, space.vectors, space.lowest, space.highest, strict=True)
    )


def _raise_once(space: CompressionSpace, levels: list[int]) -> bool:
    """Raises each unit by at most one step, in spread order, as far as all budgets allow; False: none was raised.

    A resource that the step does not need more of is no obstacle, even if it is over its budget: keeping a module costs
    bits, but none of the modules that may be dropped.
    """
    spent, raised = list(space.costs(levels)), False
    for i in _order(space):
        if levels[i] < space.highest[i]:
            now, then = space.vectors[i][levels[i]], space.vectors[i][levels[i] + 1]
            after = [s + b - a for s, a, b in zip(spent, now, then, strict=True)]
            if all(a <= max(b, s) for a, b, s in zip(after, space.budgets, spent, strict=True)):
                levels[i], spent, raised = levels[i] + 1, after, True
    return raised


def _order(space: CompressionSpace) -> list[int]:
    """Units that can change, so that any first part of them holds the kinds in equal shares, each spread over depth."""
    keys = {i: (_spread(rank), i) for members in space.groups().values() for rank, i in enumerate(members)}
    return sorted(keys, key=keys.__getitem__)


def _spread(index: int) -> float:
    """Van der Corput sequence in base 2: positions that stay evenly spread however many are taken."""
    value, scale = 0.0, 0.5
    while index:
        value += scale * (index & 1)
        index >>= 1
        scale /= 2
    return value
