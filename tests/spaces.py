"""Hypothesis strategies for small spaces, whose assignments can all be listed."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st

from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit

__all__ = ["all_feasible", "spaces"]

settings.register_profile("steady", derandomize=True, database=None, deadline=None)
settings.load_profile("steady")


@st.composite
def spaces(draw: st.DrawFn, resources: int | None = None, floors: bool = True) -> CompressionSpace:
    """A feasible space of 1 to 6 units with 1 to 4 levels, of one or two resources, some units fixed."""
    dimensions = draw(st.integers(1, 2)) if resources is None else resources
    units = []
    for i in range(draw(st.integers(1, 6))):
        count = draw(st.integers(1, 4))
        first = sorted(draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)))
        others = [draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)) for _ in range(dimensions - 1)]
        costs = tuple(first) if dimensions == 1 else tuple(zip(first, *others, strict=True))
        fixed = draw(st.none() | st.integers(0, count - 1))
        units.append(Unit(f"layers.{i}.m{i % 2}", costs, size=draw(st.integers(1, 3)), fixed=fixed))
    choices = [range(len(u.costs)) if u.fixed is None else [u.fixed] for u in units]
    vectors = [[c if isinstance(c, tuple) else (c,) for c in u.costs] for u in units]
    chosen = draw(st.tuples(*(st.sampled_from(list(c)) for c in choices)))
    cost = [sum(v[k][r] for v, k in zip(vectors, chosen, strict=True)) for r in range(dimensions)]
    slack = [draw(st.integers(0, 6)) for _ in cost]
    floor = [max(0, c - draw(st.integers(0, 4))) for c in cost] if floors and draw(st.booleans()) else [0] * dimensions
    return CompressionSpace(units, [c + s for c, s in zip(cost, slack, strict=True)], floor=floor)


def all_feasible(space: CompressionSpace) -> list[Assignment]:
    """Every feasible assignment, by the definition: all products, all sums."""
    found = []
    for levels in itertools.product(*(range(len(u.costs)) for u in space.units)):
        costs = [u.costs[k] for u, k in zip(space.units, levels, strict=True)]
        totals = [sum(c[r] if isinstance(c, tuple) else c for c in costs) for r in range(len(space.budgets))]
        allowed = all(u.fixed in (None, k) for u, k in zip(space.units, levels, strict=True))
        if allowed and all(f <= t <= b for f, t, b in zip(space.floors, totals, space.budgets, strict=True)):
            found.append(levels)
    return found
