"""Counting, uniform sampling and enumeration of the feasible assignments of a space, by dynamic programming.

The number of assignments of each total cost is the coefficient of a product of one polynomial a unit. Packed into one
big integer (each coefficient in its own field of bits), multiplying by a unit's polynomial is a few shifts and adds, so
210 units of 5 levels are counted exactly in milliseconds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, product
from operator import floordiv, sub
from typing import TYPE_CHECKING, Any

import numpy as np

from evo_hpo.errors import InfeasibleError, InvalidSpaceError

if TYPE_CHECKING:
    from numpy.random import Generator

MOST_BITS = 4_000_000_000  # of the packed polynomial: 500 MB
MOST_CELLS = 60_000_000  # of the sampling table: 480 MB
STEPS = 2**20  # cost steps where costs are too fine for the table
MOST_SUMS = 2_000_000  # distinct cost sums that the sparse count may hold


class Counter:
    """Counts, samples and enumerates; costs are given a unit, a level, a resource."""

    def __init__(
        self,
        vectors: Sequence[Sequence[tuple[int, ...]]],
        lowest: Sequence[int],
        highest: Sequence[int],
        budgets: Sequence[int],
        floors: Sequence[int],
    ) -> None:
        dimensions = len(budgets)
        self.lowest = tuple(lowest)
        options = [unit[low : high + 1] for unit, low, high in zip(vectors, lowest, highest, strict=True)]
        least = [[min(level[r] for level in unit) for r in range(dimensions)] for unit in options]
        base = [sum(unit[r] for unit in least) for r in range(dimensions)]
        shifted = [[tuple(map(sub, v, low)) for v in unit] for unit, low in zip(options, least, strict=True)]
        self.steps = [math.gcd(*(level[r] for unit in shifted for level in unit)) or 1 for r in range(dimensions)]
        self.options = [[tuple(map(floordiv, level, self.steps)) for level in unit] for unit in shifted]
        """Cost of each allowed level above the unit's cheapest, in units of the greatest common divisor."""
        self.budgets = [(b - c) // g for b, c, g in zip(budgets, base, self.steps, strict=True)]
        self.floors = [max(0, -((c - f) // g)) for f, c, g in zip(floors, base, self.steps, strict=True)]
        self.totals = [sum(max(level[r] for level in unit) for unit in self.options) for r in range(dimensions)]
        self.budgets = [min(b, t) for b, t in zip(self.budgets, self.totals, strict=True)]

    @property
    def cells(self) -> int:
        """Size of an exact table of all costs of all resources, for each unit."""
        return (len(self.options) + 1) * math.prod(b + 1 for b in self.budgets)

    @cached_property
    def unresolved(self) -> tuple[int, ...]:
        """Of several fine resources, those whose floor and budget are closer than the sampling table's grid."""
        if len(self.budgets) == 1 or self.cells <= MOST_CELLS:
            return ()
        grids = _grids(self.budgets, MOST_CELLS / (len(self.options) + 1))
        rows = enumerate(zip(self.floors, self.budgets, grids, strict=True))
        return tuple(r for r, (floor, budget, grid) in rows if floor and budget - floor < grid - 1)

    def count(self) -> int:
        """Exact number of feasible assignments."""
        if math.prod(map(len, self.options)) <= MOST_SUMS:
            return self._count_sparse()
        field = math.ceil(sum(math.log2(len(unit)) for unit in self.options)) + 1
        if field * math.prod(t + 1 for t in self.totals) <= MOST_BITS:
            return self._count_packed(field)
        return self._count_sparse()

    def _count_packed(self, field: int) -> int:
        radix = [1]
        for total in self.totals[:-1]:
            radix.append(radix[-1] * (total + 1))
        packed = 1
        width = field * radix[-1] * (self.budgets[-1] + 1)
        for unit in self.options:
            packed = sum(packed << (field * sum(c * r for c, r in zip(level, radix, strict=True))) for level in unit)
            if packed.bit_length() > width:
                packed &= (1 << width) - 1  # sums over the last resource's budget never come back
        raw = packed.to_bytes((max(packed.bit_length(), 1) + 7) // 8, "little")
        count = 0
        outer = [range(f, b + 1) for f, b in zip(self.floors[1:], self.budgets[1:], strict=True)]
        for rest in product(*outer):
            start = sum(c * r for c, r in zip(rest, radix[1:], strict=True))
            low, high = (start + self.floors[0]) * field, (start + self.budgets[0] + 1) * field
            piece = int.from_bytes(raw[low // 8 : high // 8 + 1], "little") >> (low % 8)
            count += _sum_fields(piece & ((1 << (high - low)) - 1), field, self.budgets[0] - self.floors[0] + 1)
        return count

    def _count_sparse(self) -> int:
        sums: dict[tuple[int, ...], int] = {(0,) * len(self.budgets): 1}
        for unit in self.options:
            following: dict[tuple[int, ...], int] = defaultdict(int)
            for total, ways in sums.items():
                for level in unit:
                    raised = tuple(a + b for a, b in zip(total, level, strict=True))
                    if all(a <= b for a, b in zip(raised, self.budgets, strict=True)):
                        following[raised] += ways
            if len(following) > MOST_SUMS:
                raise InvalidSpaceError(
                    f"costs are too fine to count exactly (over {MOST_SUMS} distinct sums): round them to a grid"
                )
            sums = following
        return sum(ways for total, ways in sums.items() if all(map(int.__ge__, total, self.floors)))

    @cached_property
    def table(self) -> tuple[list[list[tuple[int, ...]]], list[Any], bool]:
        """Options in table units; for each unit, ways to finish from each spent cost; whether the grid is exact."""
        options, budgets, floors = self.options, self.budgets, self.floors
        exact = self.cells <= MOST_CELLS
        if not exact:
            grids = _grids(budgets, MOST_CELLS / (len(options) + 1))
            options = [[tuple(-(-c // g) for c, g in zip(v, grids, strict=True)) for v in unit] for unit in options]
            budgets = [b // g for b, g in zip(budgets, grids, strict=True)]
            floors = [f // g for f, g in zip(floors, grids, strict=True)]
        shape = tuple(b + 1 for b in budgets)
        ways = np.zeros(shape)
        ways[tuple(slice(f, None) for f in floors)] = 1.0
        tables = [ways]
        dearest = [np.max(unit, axis=0) for unit in options]
        reaches = list(accumulate(dearest, initial=np.zeros(len(shape), dtype=int)))
        for unit, reach in zip(reversed(options), reversed(reaches[:-1]), strict=True):
            following = np.zeros(shape)
            for level in unit:
                if all(c < s for c, s in zip(level, shape, strict=True)):
                    source = tuple(slice(c, None) for c in level)
                    target = tuple(slice(None, s - c) for c, s in zip(level, shape, strict=True))
                    following[target] += ways[source]
            for axis, limit in enumerate(reach.tolist()):  # what units before cannot spend would dwarf what they can
                following[(slice(None),) * axis + (slice(limit + 1, None),)] = 0.0
            ways = following / max(following.max(), 1e-300)
            tables.append(ways)
        return options, tables[::-1], exact

    def sample(self, rng: Generator) -> tuple[int, ...]:
        """One assignment, uniform over the feasible ones."""
        options, tables, exact = self.table
        if not tables[0].flat[0]:
            raise InfeasibleError("no assignment is within floor and budget: widen them")
        for _ in range(10_000):
            uniforms = rng.random(len(options)).tolist()
            spent, chosen, total = [0] * len(self.budgets), [], [0] * len(self.budgets)
            for i, unit in enumerate(options):
                table = tables[i + 1]
                targets = [tuple(a + b for a, b in zip(spent, level, strict=True)) for level in unit]
                weights = [
                    table[t] if all(a < s for a, s in zip(t, table.shape, strict=True)) else 0.0 for t in targets
                ]
                pick, threshold = 0, uniforms[i] * sum(weights)
                while pick < len(weights) - 1 and (threshold >= weights[pick] or not weights[pick]):
                    threshold -= weights[pick]
                    pick += 1
                while not weights[pick]:  # rounding may run past the last level that fits
                    pick -= 1
                chosen.append(pick)
                spent = list(targets[pick])
                total = [a + b for a, b in zip(total, self.options[i][pick], strict=True)]
            if exact or all(f <= t <= b for f, t, b in zip(self.floors, total, self.budgets, strict=True)):
                return tuple(pick + low for pick, low in zip(chosen, self.lowest, strict=True))
        raise InfeasibleError("floor and budget are closer than the grid of costs resolves: widen them")

    def enumerate(self) -> Iterator[tuple[int, ...]]:
        """Every feasible assignment, lexicographic, never entering a branch without a feasible leaf by cost bounds."""
        dimensions = range(len(self.budgets))
        most = [[0] * len(self.budgets)]
        for unit in reversed(self.options):
            most.append([most[-1][r] + max(level[r] for level in unit) for r in dimensions])
        most.reverse()
        chosen = [0] * len(self.options)

        def extend(i: int, spent: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
            if i == len(self.options):
                yield tuple(pick + low for pick, low in zip(chosen, self.lowest, strict=True))
                return
            for pick, level in enumerate(self.options[i]):
                raised = tuple(a + b for a, b in zip(spent, level, strict=True))
                if all(
                    raised[r] <= self.budgets[r] and raised[r] + most[i + 1][r] >= self.floors[r] for r in dimensions
                ):
                    chosen[i] = pick
                    yield from extend(i + 1, raised)

        return extend(0, (0,) * len(self.budgets))


def _sum_fields(packed: int, field: int, fields: int) -> int:
    """Sum of ``fields`` integers of ``field`` bits, halving; the sum of all must fit one field."""
    while fields > 1:
        half = (fields + 1) // 2
        packed = (packed & ((1 << (half * field)) - 1)) + (packed >> (half * field))
        fields = half
    return packed


def _grids(budgets: Sequence[int], cells: float) -> list[int]:
    """Cost of a step of each resource's grid, so that about ``cells`` hold all; small budgets stay exact."""
    grids = [1] * len(budgets)
    order = sorted(range(len(budgets)), key=budgets.__getitem__)
    for n, r in enumerate(order):
        steps = max(2, min(STEPS, int(cells ** (1 / (len(order) - n)))))
        grids[r] = max(1, -(-budgets[r] // steps))
        cells /= budgets[r] // grids[r] + 1
    return grids
