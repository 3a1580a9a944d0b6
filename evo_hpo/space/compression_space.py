"""The constrained discrete space that every searcher works on.

A *unit* (a linear layer, an attention or MLP module, or several of them tied together) takes one of its *levels*;
level 0 is the cheapest, that is the most compressed. Costs are exact integers (bits, weights kept), never floats. An
*assignment* is one level index per unit; it is *feasible* when ``floor <= total cost <= budget`` for every resource.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

from evo_hpo.errors import InfeasibleError, InvalidSpaceError
from evo_hpo.space.knapsack import Assignment, Knapsack
from evo_hpo.space.repair import repair
from evo_hpo.space.uniform import uniform
from evo_hpo.space.unit import Unit, integer

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["Assignment", "CompressionSpace", "Unit"]


class CompressionSpace:
    """All assignments of levels to units, and which of them the budget allows.

    Args:
        units: the units, in the order of the assignment's entries.
        budget: the most that an assignment may cost, one integer a resource.
        floor: the least that an assignment must cost (default 0); ``floor=budget`` demands the exact cost.
        resources: names of the resources, for messages and tables; None: "cost", or numbers where there are several.
        ranged: every budget from foot to budget is searched, for a front; see :mod:`evo_hpo.space.ranges`.
        foot: the least budget of a range, in the first resource's cost; None: its floor.

    Raises:
        InvalidSpaceError: duplicate names, a module in two units, or costs or names for another number of resources.
        InfeasibleError: the budget is below the cheapest assignment, or the floor above the dearest.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        budget: int | Sequence[int],
        *,
        floor: int | Sequence[int] = 0,
        resources: Sequence[str] | None = None,
        ranged: bool = False,
        foot: int | None = None,
    ) -> None:
        self.ranged = ranged
        self.units: tuple[Unit, ...] = tuple(units)
        if not self.units:
            raise InvalidSpaceError("a space needs at least one unit")
        names = [u.name for u in self.units]
        if len(set(names)) != len(names):
            twice = next(n for i, n in enumerate(names) if n in names[:i])
            raise InvalidSpaceError(f"unit names must be unique, found twice: {twice!r}")
        owner: dict[str, str] = {}
        for unit in self.units:
            for member in unit.members:
                if (other := owner.setdefault(member, unit.name)) != unit.name:
                    raise InvalidSpaceError(
                        f"module {member!r} belongs to units {other!r} and {unit.name!r}: tie it to one of them"
                    )
        first = self.units[0].costs[0]
        count = len(first) if isinstance(first, tuple) else 1
        if resources is None:
            resources = ("cost",) if count == 1 else [f"resource {r}" for r in range(count)]
        if isinstance(resources, str) or len(resources) != count:
            raise InvalidSpaceError(
                f"resources={resources!r} must name each of the {count} resources that the levels cost"
            )
        self.resources: tuple[str, ...] = tuple(resources)
        self.vectors: tuple[tuple[tuple[int, ...], ...], ...] = tuple(
            tuple(c if isinstance(c, tuple) else (c,) for c in u.costs) for u in self.units
        )
        """Cost of each unit's levels, a tuple of resources each."""
        if any(len(level) != count for unit in self.vectors for level in unit):
            raise InvalidSpaceError(f"every unit needs costs for the same {count} resource(s)")
        self.budgets: tuple[int, ...] = self._limits(budget, "budget")
        self.floors: tuple[int, ...] = self._limits(floor, "floor") if floor != 0 else (0,) * count
        self.foot = self.floor if foot is None else foot
        self.lowest: Assignment = tuple(0 if u.fixed is None else u.fixed for u in self.units)
        self.highest: Assignment = tuple(len(u.costs) - 1 if u.fixed is None else u.fixed for u in self.units)
        self.knapsack = Knapsack(self.vectors, self.lowest, self.highest, self.budgets, self.floors)
        """Costs and limits alone: what walks from assignment to assignment need."""
        self._check_reachable()

    @classmethod
    def from_average(
        cls, units: Sequence[Unit], average: float | str, *, others: Sequence[int] = (), **settings: Any
    ) -> CompressionSpace:
        """The space whose budget is ``average`` cost a weight, rounded down to a whole cost.

        Args:
            units: as for the space itself.
            average: of the first resource, for example bits a weight.
            others: total budget of each other resource, where units cost several.
            settings: the space's further arguments.

        Raises:
            InvalidSpaceError: the average is not a number, or ``others`` does not give one total a further resource.
            InfeasibleError: the average is below the cheapest assignment, or above the dearest.
        """
        try:
            exact = Fraction(str(average))
        except (ValueError, ZeroDivisionError):
            raise InvalidSpaceError(
                f"average {average!r} is not a number: give cost a weight, as 3 or '3.25'"
            ) from None
        first = units[0].costs[0] if units else 0
        further = len(first) - 1 if isinstance(first, tuple) else 0
        others = tuple(others) if isinstance(others, Iterable) else (others,)
        if len(others) != further:
            raise InvalidSpaceError(
                f"others={list(others)} must give the total budget of each resource after the first, {further} here"
            )
        total = math.floor(exact * sum(u.size for u in units))
        space = cls(units, (total, *others) if further else total, **settings)
        least, most = space.cost(space.lowest), space.cost(space.highest)
        if space.budget > most:
            raise InfeasibleError(
                f"an average of {average} {space.resources[0]} a weight is above the dearest assignment: give one from"
                f" {least / space.total_size:.4g} to {most / space.total_size:.4g}"
            )
        return space

    def _limits(self, value: int | Sequence[int], what: str) -> tuple[int, ...]:
        limits = tuple(map(integer, value)) if isinstance(value, Sequence) else (integer(value),)
        if len(limits) != len(self.resources):
            raise InvalidSpaceError(f"{what} {value!r} must give one integer for each of: {', '.join(self.resources)}")
        return limits

    def _check_reachable(self) -> None:
        for r, name in enumerate(self.resources):
            units = zip(self.vectors, self.lowest, self.highest, strict=True)
            costs = [[level[r] for level in unit[low : high + 1]] for unit, low, high in units]
            least, most = sum(map(min, costs)), sum(map(max, costs))
            if self.budgets[r] < least:
                raise InfeasibleError(
                    f"budget {self.budgets[r]} {name} is below the cheapest assignment, "
                    f"{least}{self._per_weight(least)}: raise the budget or add cheaper levels"
                )
            if self.floors[r] > min(most, self.budgets[r]):
                raise InfeasibleError(
                    f"floor {self.floors[r]} {name} is above "
                    + (f"the dearest assignment, {most}" if self.floors[r] > most else f"the budget {self.budgets[r]}")
                    + ": lower the floor"
                )

    def _per_weight(self, cost: int) -> str:
        return f" ({cost / self.total_size:.4g} a weight)" if self.total_size > len(self.units) else ""

    @property
    def budget(self) -> int:
        """The most of the first resource that an assignment may cost."""
        return self.budgets[0]

    @property
    def floor(self) -> int:
        """The least of the first resource that an assignment must cost."""
        return self.floors[0]

    @cached_property
    def total_size(self) -> int:
        """Number of weights in all units."""
        return sum(u.size for u in self.units)

    @property
    def two_levels(self) -> bool:
        """True where no unit has more than two levels to choose from, as in depth pruning."""
        return all(high - low <= 1 for low, high in zip(self.lowest, self.highest, strict=True))

    def __len__(self) -> int:
        return len(self.units)

    def __repr__(self) -> str:
        return f"CompressionSpace({len(self.units)} units, budget={self.budgets}, floor={self.floors})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompressionSpace) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.units, self.budgets, self.floors))

    def cost(self, levels: Sequence[int]) -> int:
        """Total cost of the first resource."""
        return self.knapsack.cost(levels)

    def costs(self, levels: Sequence[int]) -> tuple[int, ...]:
        """Total cost of every resource."""
        return self.knapsack.spent(levels)

    def slack(self, levels: Sequence[int]) -> int:
        """Unspent budget of the first resource; negative: over the budget."""
        return self.budgets[0] - self.knapsack.cost(levels)

    def average(self, levels: Sequence[int]) -> float:
        """Cost of the first resource a weight, for example average bits."""
        return self.cost(levels) / self.total_size

    def feasible(self, levels: Sequence[int]) -> bool:
        """True when every level exists, fixed units are untouched, and every resource is within floor and budget."""
        return self.knapsack.feasible(levels)

    def check(self, levels: Sequence[int]) -> Assignment:
        """The assignment as a tuple.

        Raises:
            InvalidSpaceError: a level that is not an integer.
            InfeasibleError: with the reason, when the assignment is not feasible.
        """
        levels = tuple(integer(level, "level") for level in levels)
        if self.feasible(levels):
            return levels
        if len(levels) != len(self.units):
            raise InfeasibleError(f"assignment has {len(levels)} levels, the space has {len(self.units)} units")
        for unit, level, low, high in zip(self.units, levels, self.lowest, self.highest, strict=True):
            if not low <= level <= high:
                raise InfeasibleError(f"unit {unit.name!r} has level {level}, allowed {low}..{high}")
        raise InfeasibleError(f"assignment costs {self.costs(levels)}, allowed {self.floors} to {self.budgets}")

    def labels(self, levels: Sequence[int]) -> dict[str, str]:
        """Unit name -> label of its level."""
        return {u.name: u.levels[k] for u, k in zip(self.units, levels, strict=True)}

    def from_labels(self, labels: Mapping[str, str]) -> Assignment:
        """The assignment that :meth:`labels` describes; units that are not named are an error.

        Raises:
            InvalidSpaceError: a unit or a label is unknown or missing.
        """
        unknown = sorted(set(labels) - {u.name for u in self.units})
        if unknown:
            raise InvalidSpaceError(f"unknown unit {unknown[0]!r}; the space's first unit is {self.units[0].name!r}")
        levels = []
        for unit in self.units:
            label = labels.get(unit.name)
            if label is None or str(label) not in unit.levels:
                raise InvalidSpaceError(f"unit {unit.name!r} has level {label!r}, allowed: {', '.join(unit.levels)}")
            levels.append(unit.levels.index(str(label)))
        return tuple(levels)

    def groups(self, rule: str = "size") -> dict[str, tuple[int, ...]]:
        """Units (indices, only those that can change) that may exchange level steps.

        ``size``: the unit's group, or else its size and cost step; ``name``: the unit's role; ``none``: one group.
        """
        keys: dict[str, Callable[[Unit], str]] = {"size": _size_key, "name": lambda u: u.role, "none": lambda u: "all"}
        if rule not in keys:
            raise InvalidSpaceError(f"group rule {rule!r} must be one of: size, name, none")
        found: dict[str, list[int]] = {}
        for i in self.knapsack.free:
            found.setdefault(keys[rule](self.units[i]), []).append(i)
        return {name: tuple(members) for name, members in found.items()}

    def switches(self, levels: Sequence[int], rule: str = "size") -> Iterator[Assignment]:
        """Every feasible assignment that lowers one unit by a step and raises another of its group by a step."""
        cursor = self.knapsack.cursor(levels)
        for members in self.groups(rule).values():
            for down, up in itertools.permutations(members, 2):
                if (found := cursor.peek((down, -1), (up, +1))) is not None:
                    yield found

    def count(self) -> int:
        """Exact number of feasible assignments, by dynamic programming over costs.

        Raises:
            InvalidSpaceError: costs too many and too fine to count exactly.
        """
        return self.knapsack.counter.count()

    def sample(self, rng: Generator) -> Assignment:
        """A feasible assignment, uniform over all of them (to floating-point precision of the counts, 1e-12).

        Where costs are too fine for the table (60 million cells), they are rounded up to a grid of at most 2^20 steps a
        resource, fewer where several are fine, and the draw is uniform over the assignments that fit the rounded
        budget: some of those nearest to the budget are left out. Of several resources, one whose floor and budget are
        closer than that grid is left out of the draw, which is then repaired.
        """
        if self.knapsack.counter.unresolved:
            return self.repair(self._without_floors.counter.sample(rng), rng)
        return self.knapsack.counter.sample(rng)

    @cached_property
    def _without_floors(self) -> Knapsack:
        """The knapsack without the floors that the sampling table cannot resolve."""
        unresolved = self.knapsack.counter.unresolved
        floors = tuple(0 if r in unresolved else floor for r, floor in enumerate(self.floors))
        return replace(self.knapsack, floors=floors)

    def enumerate(self) -> Iterator[Assignment]:
        """Every feasible assignment, in lexicographic order."""
        return self.knapsack.counter.enumerate()

    def uniform(self) -> Assignment:
        """Uniform compression; see :func:`evo_hpo.space.uniform.uniform`."""
        return self._uniform

    @cached_property
    def _uniform(self) -> Assignment:
        return uniform(self.knapsack, [u.size for u in self.units], self.groups().values())

    def repair(self, levels: Sequence[float], rng: Generator | None = None, *, fill: bool = False) -> Assignment:
        """The feasible assignment near ``levels``; see :func:`evo_hpo.space.repair.repair`."""
        return repair(self.knapsack, levels, rng, fill=fill)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready description; :meth:`from_json` gives an equal space back."""
        return {
            "units": [json.loads(json.dumps(asdict(u))) for u in self.units],
            "budget": list(self.budgets),
            "floor": list(self.floors),
            "resources": list(self.resources),
            **({"ranged": True} if self.ranged else {}) | ({} if self.foot == self.floor else {"foot": self.foot}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CompressionSpace:
        """The space that :meth:`to_json` described."""
        given = {key: data[key] for key in ("floor", "resources", "ranged", "foot") if key in data}
        return cls([Unit(**entry) for entry in data["units"]], data["budget"], **given)

    def describe(self) -> str:
        """A readable summary: units, levels, groups, budget."""
        lines = [f"{len(self.units)} units, {self.total_size} weights"]
        for name, members in self.groups().items():
            labels = sorted({self.units[i].levels for i in members}, key=lambda levels: (len(levels), levels))
            lines.append(f"  group {name}: {len(members)} units, levels {' | '.join(', '.join(ls) for ls in labels)}")
        if fixed := sum(u.fixed is not None for u in self.units):
            lines.append(f"  fixed: {fixed} units")
        for name, floor, budget in zip(self.resources, self.floors, self.budgets, strict=True):
            least = f", at least {floor}{self._per_weight(floor) if self.ranged else ''}" if floor else ""
            lines.append(f"  {name}: at most {budget}{self._per_weight(budget)}{least}")
        return "\n".join(lines)


def _size_key(unit: Unit) -> str:
    if unit.group is not None:
        return unit.group
    first = [c[0] if isinstance(c, tuple) else c for c in unit.costs]
    step = math.gcd(*(b - a for a, b in itertools.pairwise(first)))
    return f"{unit.size} weights, step {step}"
