"""Uniform compression: what every search starts from and has to beat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

from evo_hpo.space.knapsack import Assignment, Knapsack
from evo_hpo.space.repair import repair


def uniform(knapsack: Knapsack, sizes: Sequence[int], groups: Iterable[Sequence[int]]) -> Assignment:
    """The highest cost a weight that all units can share within the budget, one resource.

    What is left of a fractional budget raises units by one step each: every kind of unit in the same share, each kind
    spread evenly over the depth. With several resources, units are raised from their cheapest levels in that order,
    round by round, as far as every budget allows.

    Args:
        knapsack: where the result is feasible.
        sizes: number of weights of each unit.
        groups: the units of each kind that can change, in order of depth.
    """
    order = _order(groups)
    if knapsack.several:
        levels = _raised(knapsack, knapsack.lowest, order)
        if knapsack.feasible(levels):
            return levels
        repaired = repair(knapsack, levels)
        raised = _raised(knapsack, repaired, order)
        return raised if knapsack.feasible(raised) else repaired  # what eases a budget may miss a floor
    if len(set(knapsack.costs)) == 1:  # a level costs the same in all units, as a dropped module does
        sizes = [1] * len(sizes)
    offered = {(c, size) for size, unit in zip(sizes, knapsack.first_costs, strict=True) for c in unit}
    ratios = sorted({Fraction(*pair) for pair in offered})
    low, high = 0, len(ratios) - 1
    while low < high:
        middle = (low + high + 1) // 2
        affordable = knapsack.cost(_up_to(knapsack, sizes, ratios[middle])) <= knapsack.budgets[0]
        low, high = (middle, high) if affordable else (low, middle - 1)
    levels = _up_to(knapsack, sizes, ratios[low])
    if knapsack.cost(levels) > knapsack.budgets[0]:
        levels = repair(knapsack, levels)
    cursor = knapsack.cursor(levels)
    cursor.spend(order)  # also where a floor is not met yet: repair would not spread what it raises
    return cursor.assignment() or repair(knapsack, cursor.levels)


def _up_to(knapsack: Knapsack, sizes: Sequence[int], ratio: Fraction) -> Assignment:
    """The dearest level of each unit whose cost a weight is at most ``ratio``."""
    units = zip(sizes, knapsack.first_costs, knapsack.lowest, knapsack.highest, strict=True)
    return tuple(
        max([k for k in range(low, high + 1) if costs[k] * ratio.denominator <= ratio.numerator * size], default=low)
        for size, costs, low, high in units
    )


def _raised(knapsack: Knapsack, levels: Assignment, order: Sequence[int]) -> Assignment:
    """All units raised by a step each, in order, round after round, as far as all budgets allow."""
    cursor, before = knapsack.cursor(levels), [-1]
    while cursor.levels != before:
        before = list(cursor.levels)
        for unit in order:
            if cursor.eases(unit):
                cursor.step(unit)
    return tuple(cursor.levels)


def _order(groups: Iterable[Sequence[int]]) -> list[int]:
    """The units, so that any first part of them holds the kinds in equal shares, each spread over depth."""
    keys = {i: (_spread(rank), i) for members in groups for rank, i in enumerate(members)}
    return sorted(keys, key=keys.__getitem__)


def _spread(index: int) -> float:
    """Van der Corput sequence in base 2: positions that stay evenly spread however many are taken."""
    value, scale = 0.0, 0.5
    while index:
        value += scale * (index & 1)
        index >>= 1
        scale /= 2
    return value
