"""Ranges of budgets: the space of all assignments between two budgets, and the single budgets in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from evo_hpo.errors import InfeasibleError, InvalidSettingError
from evo_hpo.space.compression_space import Assignment, CompressionSpace

MARKS = 20
"""Steps from the foot of a range to its budget at which a front is looked at."""


def ends(value: Any, what: str) -> tuple[Any, Any] | None:
    """What ``{ from = ..., to = ... }`` says; None: it is a single budget.

    Raises:
        InvalidSettingError: a table with other keys, or both ends are equal.
    """
    if not isinstance(value, Mapping):
        return None
    if set(value) != {"from", "to"} or value["from"] == value["to"]:
        raise InvalidSettingError(f"{what}={dict(value)} must be one budget, or a range: {{ from = ..., to = ... }}")
    return value["from"], value["to"]


def each(value: Any, what: str) -> tuple[Any, ...]:
    """Both ends of a range, or the one budget that there is; errors as :func:`ends`."""
    return ends(value, what) or (value,)


def over(value: Any, what: str, make: Callable[[Any], CompressionSpace]) -> CompressionSpace:
    """The space of a setting's budget, or of its range, from what makes the space of one budget."""
    both = ends(value, what)
    return make(value) if both is None else spanning(*map(make, both))


def spanning(one: CompressionSpace, other: CompressionSpace) -> CompressionSpace:
    """All assignments between the budgets of two spaces, which differ in nothing else.

    Its :func:`foot` is what uniform compression costs at the lower of them, or it would be out of reach there. Further
    resources keep the budgets of the higher one.

    Raises:
        InfeasibleError: uniform compression costs the same at both.
    """
    low, high = sorted((one, other), key=lambda space: space.budgets)
    least = low.cost(low.uniform())
    if least >= high.cost(high.uniform()):
        raise InfeasibleError(
            f"a range from {low.budget} to {high.budget} {high.resources[0]} holds one uniform assignment: widen it"
        )
    floor = (max(0, least - _unspent(high)), *high.floors[1:])
    return CompressionSpace(high.units, high.budgets, floor=floor, resources=high.resources, ranged=True, foot=least)


def _unspent(space: CompressionSpace) -> int:
    """What an assignment may leave of a budget where costs are finer than steps, so that few spend it to the end.

    The median step of a level to the next dearer one; 0 where all costs are multiples of the smallest step.
    """
    counter = space.knapsack.counter
    costs = [sorted({cost[0] for cost in unit}) for unit in counter.options]  # in what all have in common
    steps = sorted(after - before for unit in costs for before, after in itertools.pairwise(unit))
    return steps[len(steps) // 2] * counter.steps[0] if steps and steps[0] > 1 else 0


def foot(space: CompressionSpace) -> int:
    """The least budget of a range, and the least cost of the first resource in other spaces."""
    return max(space.foot, space.cost(space.lowest))


def marks(space: CompressionSpace, steps: int = MARKS) -> tuple[int, ...]:
    """Budgets from the foot of the range to its budget, evenly spaced and rounded down; distinct, ascending."""
    low = foot(space)
    return tuple(sorted({low + (space.budget - low) * step // steps for step in range(steps + 1)}))


def at(space: CompressionSpace, budget: int) -> CompressionSpace:
    """The assignments of the space within one budget of the first resource."""
    budgets = (budget, *space.budgets[1:])
    return CompressionSpace(space.units, budgets, floor=space.floors, resources=space.resources)


def uniform_at(space: CompressionSpace, steps: int = MARKS) -> list[Assignment]:
    """Uniform compression at each of the :func:`marks`; distinct, ascending in cost."""
    found = dict.fromkeys(at(space, budget).uniform() for budget in marks(space, steps))
    return sorted((levels for levels in found if space.feasible(levels)), key=space.cost)
