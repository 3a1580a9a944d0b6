"""EvoPress's mutation on the ordered parameters of another library's study, of which some share a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from numpy.random import Generator

from evo_hpo.errors import InvalidSettingError, InvalidSpaceError
from evo_hpo.search.searcher import probability
from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit
from searchers.evopress.mutation import Exchange, Uniforms, mutation, switch_counts

LONG = 32  # levels from which single steps would take too long
TRIES = 200


def budget_space(
    costs: Mapping[str, Sequence[int]], budget: int, *, floor: int = 0, groups: Mapping[str, str] | None = None
) -> CompressionSpace:
    """The space of parameters that share a budget: ``costs`` gives the cost of each value, in ascending order.

    Raises:
        InvalidSpaceError: costs that are not ascending integers.
        InfeasibleError: no assignment meets the budget.
    """
    known = groups or {}
    return CompressionSpace([Unit(n, tuple(c), group=known.get(n)) for n, c in costs.items()], budget, floor=floor)


class Breeder:
    """Offspring of a parent: level switches among the axes that share a budget, free steps of all others.

    A mutation takes r = min of two draws from 1..``max_switches`` switches. Each falls on the axes of the budget with
    probability proportional to their number, else on one other axis, which moves a step up or down; axes of more
    than 32 levels move by a log-uniform number of steps. Where a parent leaves budget that pays for a
    step, half of the mutations are exchanges, which spend it.

    Args:
        sizes: number of levels of each axis, in order.
        space: the budget over the axes ``members`` (in the space's order of units), or None.
        members: positions of those axes.
        max_switches: most switches of one offspring.
        cross_group: probability that an offspring exchanges budget across groups; see ``EvoPress``.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        space: CompressionSpace | None = None,
        members: Sequence[int] = (),
        *,
        max_switches: int = 3,
        cross_group: float = 0.5,
    ) -> None:
        self.sizes = tuple(sizes)
        self.space = space
        self.members = tuple(members)
        self.free = tuple(i for i in range(len(sizes)) if i not in set(members) and sizes[i] > 1)
        if max_switches < 1:
            raise InvalidSettingError(f"max_switches={max_switches!r} must be an integer of at least 1")
        self._switches = switch_counts("min_of_two", max_switches)
        cross_group = probability("cross_group", cross_group)
        self._mutate = mutation(space, "size", cross_group) if space is not None else None
        rule = "none" if cross_group else "size"
        self._exchange = Exchange(space, rule) if space is not None else None
        if space is not None:
            for position, unit in zip(self.members, space.units, strict=True):
                if len(unit.costs) != self.sizes[position]:
                    found, given = self.sizes[position], len(unit.costs)
                    raise InvalidSpaceError(f"parameter {unit.name!r} has {found} values, costs are given for {given}")

    def feasible(self, levels: Assignment) -> bool:
        """True when the axes of the budget keep it."""
        return self.space is None or self.space.feasible([levels[i] for i in self.members])

    def random(self, stream: Uniforms, rng: Generator) -> Assignment:
        """A random feasible point, uniform over the assignments of the budget."""
        levels = [stream.below(n) for n in self.sizes]
        if self.space is not None:
            chosen = self.space.sample(rng)
            for position, level in zip(self.members, chosen, strict=True):
                levels[position] = level
        return tuple(levels)

    def child(self, parent: Assignment, stream: Uniforms, taken: Callable[[Assignment], bool]) -> Assignment:
        """A feasible mutant that is not the parent and, where one is found, not ``taken``.

        After 200 draws in vain it takes any number of switches; the parent itself where there is no mutant at all.
        """
        found = None
        for attempt in range(2 * TRIES):
            far = attempt >= TRIES
            switches = 1 + stream.below(len(self.sizes)) if far else self._switches(stream)
            levels = self._mutant(parent, stream, switches)
            if levels is None or levels == parent:
                continue
            found = levels
            if not taken(levels):
                break
        return parent if found is None else found

    def _mutant(self, parent: Assignment, stream: Uniforms, switches: int) -> Assignment | None:
        total = len(self.members) + len(self.free)
        if not total:
            return None
        inside = sum(stream.below(total) < len(self.members) for _ in range(switches))
        levels = list(parent)
        if inside and self._mutate is not None and self._exchange is not None:
            old = tuple(parent[i] for i in self.members)
            spend = self._exchange.unspent(old) and stream.chance(0.5)  # no switch spends what is left
            changed = (self._exchange if spend else self._mutate)(old, stream, inside)
            if changed is None:
                return None
            for position, level in zip(self.members, changed, strict=True):
                levels[position] = level
        for _ in range(switches - inside):
            self._step(levels, stream)
        return tuple(levels)

    def _step(self, levels: list[int], stream: Uniforms) -> None:
        i = self.free[stream.below(len(self.free))]
        size, step = self.sizes[i], 1
        if size > LONG:
            step = int(math.exp(math.log(size / 4) * stream.below(2**20) / 2**20))
        up = stream.chance(0.5)
        if levels[i] + step >= size or levels[i] - step < 0:
            up = levels[i] < size / 2
        levels[i] = min(max(levels[i] + (step if up else -step), 0), size - 1)
