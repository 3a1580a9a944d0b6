"""Deterministic projection of any level vector onto the budget.

Foreign optimizers propose vectors that ignore the budget. Repair rounds to the nearest allowed levels, then takes the
single steps that move least away from the proposal for the cost they free (or add) until every resource is within its
floor and budget. Ties go to the later unit, or at random where a generator is given: breaking them by position biases
an optimizer's whole search.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evo_hpo.errors import InfeasibleError, InvalidSpaceError
from evo_hpo.space.knapsack import Assignment, Cursor, Knapsack

if TYPE_CHECKING:
    from numpy.random import Generator

MOST_PAIRS = 20
"""Pairs of changes that are tried before the table."""

ALIKE = 3
"""Changes of equal cost that are looked at: no more than three are made at a time."""

ROUNDS = 3
"""Times that prices are adjusted to each other."""

SMALL = 200_000
"""Cells of the table of costs up to which several resources are projected exactly, within milliseconds."""


def repair(
    knapsack: Knapsack, levels: Sequence[float], rng: Generator | None = None, *, fill: bool = False
) -> Assignment:
    """The feasible assignment reached from ``levels`` (real-valued level indices, one a unit) by least-distance steps.

    Args:
        knapsack: where the result is feasible.
        levels: proposal, may be fractional, out of range or over the budget.
        rng: breaks ties at random; without it, the same proposal always gives the same result.
        fill: spend what is left of the budget too, by raising the units whose proposal is furthest above.

    Raises:
        InvalidSpaceError: wrong length, or entries that are not finite.
        InfeasibleError: the knapsack has no feasible assignment.
    """
    wish = [float(x) for x in levels]
    if len(wish) != len(knapsack.costs) or not all(map(math.isfinite, wish)):
        raise InvalidSpaceError(f"repair needs {len(knapsack.costs)} finite levels, got {len(wish)}: {wish[:5]} ...")
    ties: Sequence[float] = rng.random(len(wish)).tolist() if rng is not None else range(len(wish), 0, -1)
    limits = zip(wish, knapsack.lowest, knapsack.highest, strict=True)
    cursor = knapsack.cursor([min(max(round(w), low), high) for w, low, high in limits])

    def farther(unit: int, by: int) -> float:
        """Distance from the proposal that a step adds."""
        return abs(cursor.levels[unit] + by - wish[unit]) - abs(cursor.levels[unit] - wish[unit])

    if not knapsack.several:
        cursor.follow(-1, farther, ties, 0)
        cursor.follow(+1, farther, ties, 0 if fill else knapsack.room[0])
    elif knapsack.counter.cells > SMALL:
        narrow = any(room < widest for room, widest in zip(knapsack.room, knapsack.widest, strict=True))
        near = _priced(knapsack, cursor, wish, ties) if narrow else _walked(cursor, wish, ties)
        cursor = knapsack.cursor(_paired(knapsack, near, wish, ties))
    if not cursor.feasible:
        cursor = knapsack.cursor(_nearest(knapsack, wish, ties))
    if fill and knapsack.several:
        cursor.follow(+1, farther, ties, -1)
    return tuple(cursor.levels)


def _walked(cursor: Cursor, wish: Sequence[float], ties: Sequence[float]) -> list[int]:
    """Several resources: levels after steps that bring those out of their limits nearer, without putting others out.

    Steps are taken in order of added distance for what they bring, in shares of each resource's budget. It may end
    short of the limits where costs of two resources run against each other.
    """
    knapsack, levels, left = cursor.knapsack, cursor.levels, list(cursor.left)
    rises, room, lowest, highest = knapsack.rises, knapsack.room, knapsack.lowest, knapsack.highest
    shares = [1 / max(b, 1) for b in knapsack.budgets]
    resources = range(len(room))

    def entry(i: int, by: int) -> tuple[float, float, int, int] | None:
        level = levels[i]
        if level == (highest if by > 0 else lowest)[i]:
            return None
        rise, brings = rises[i][level if by > 0 else level - 1], 0.0
        for r in resources:
            after = left[r] - by * rise[r]
            after = -after if after < 0 else after - room[r] if after > room[r] else 0
            if after > out[r]:
                return None
            brings += (out[r] - after) * shares[r]
        if brings <= 0:
            return None
        return (abs(level + by - wish[i]) - abs(level - wish[i])) / brings, ties[i], i, by

    while any(out := [max(-u, u - most, 0) for u, most in zip(left, room, strict=True)]):
        heap = [e for i in knapsack.free for by in (-1, +1) if (e := entry(i, by)) is not None]
        if not heap:
            break
        heapq.heapify(heap)
        short = [o > 0 for o in out]
        while heap and [o > 0 for o in out] == short:  # which steps help changes with what is out of its limits
            _, _, i, by = heapq.heappop(heap)
            if entry(i, by) is None:
                continue
            rise = rises[i][levels[i] if by > 0 else levels[i] - 1]
            levels[i] += by
            for r in resources:
                left[r] -= by * rise[r]
                out[r] = max(-left[r], left[r] - room[r], 0)
            if (again := entry(i, by)) is not None:
                heapq.heappush(heap, again)
    return levels


def _priced(knapsack: Knapsack, cursor: Cursor, wish: Sequence[float], ties: Sequence[float]) -> list[int]:
    """Several resources, one of them with hardly any room: levels of costs near the limits, at little distance.

    Every unit takes the level of least distance plus what it costs at a price a resource (Lagrange's multipliers); each
    price in turn is the one nearest to 0 at which its resource is within its limits. Single steps would stop at once
    where they leave the limits of the one that has no room. Distances differ by up to a tenth, so that alike
    units do not change all at once.
    """
    if cursor.feasible:
        return cursor.levels
    whole, allowed = knapsack.array
    share = 1 / np.maximum(np.array(knapsack.budgets, dtype=float), 1)
    costs = np.ascontiguousarray((whole.astype(float) * share).transpose(2, 0, 1))
    distances = np.abs(np.arange(allowed.shape[1]) - np.array(wish)[:, None])
    distances *= 1 + 0.1 / (max(ties) or 1) * np.array(ties)[:, None]
    distances[~allowed] = np.inf
    most, least = np.array(knapsack.budgets) * share, np.array(knapsack.floors) * share
    prices, rows = np.zeros(len(costs)), np.arange(len(distances))

    def spent(r: int, price: float) -> float:
        """Of a resource, where every unit takes the level that its price and the others' make best."""
        return float(costs[r][rows, np.argmin(others + price * costs[r], axis=1)].sum())

    for _ in range(ROUNDS):
        for r in range(len(costs)):
            others = distances + np.tensordot(np.delete(prices, r), np.delete(costs, r, axis=0), 1)
            free = spent(r, 0.0)
            sign, limit = (1, most[r]) if free > most[r] else (-1, least[r])
            low = high = 0.0
            while high < 1e9 and sign * (spent(r, sign * high) - limit) > 0:
                low, high = high, 4 * high or 16.0
            for _ in range(10 if high else 0):
                middle = (low + high) / 2
                low, high = (middle, high) if sign * (spent(r, sign * middle) - limit) > 0 else (low, middle)
            prices[r] = sign * high
    return np.argmin(distances + np.tensordot(prices, costs, 1), axis=1).tolist()  # type: ignore[no-any-return]


def _paired(knapsack: Knapsack, levels: list[int], wish: Sequence[float], ties: Sequence[float]) -> list[int]:
    """Several resources: levels after changes of two units at a time that bring the costs into their limits.

    The pair of least distance that meets all limits ends it; until there is one, the pair that comes nearest to them is
    taken, and where none comes nearer, a third unit is changed too, or another start is tried.
    """
    costs, allowed = knapsack.array
    units, room = np.arange(len(levels)), np.array(knapsack.room, dtype=costs.dtype)
    shares = 1 / np.maximum(np.array(knapsack.budgets, dtype=float), 1)
    key = min(range(len(room)), key=lambda r: knapsack.room[r] * shares[r])
    distances = np.abs(np.arange(costs.shape[1]) - np.array(wish)[:, None])
    distances *= 1 + 1e-9 / (max(ties) or 1) * np.array(ties)[:, None]
    unit, level = np.nonzero(allowed)  # staying is a change too: it makes a single one a pair

    def outside(left: Any) -> Any:
        """How far what is left is out of the limits, in shares of the budgets."""
        return (np.maximum(np.maximum(-left, left - room), 0) * shares).sum(-1)

    def partners(left: Any) -> tuple[Any, Any]:
        """For each change, where those begin and end that together with it meet the limits of the key resource."""
        wanted = left[key] - costing[:, key]
        return np.searchsorted(costing[:, key], wanted - room[key]), np.searchsorted(costing[:, key], wanted, "right")

    def meeting(left: Any, begin: Any, end: Any) -> tuple[Any, Any, Any]:
        """The pairs that meet the limits of the key resource, and how far each is out of the others'."""
        counts = end - begin
        a = np.repeat(changes, counts)
        b = np.arange(len(a)) + np.repeat(begin - np.cumsum(counts) + counts, counts)
        apart = of[a] < of[b]
        a, b = a[apart], b[apart]
        return a, b, outside(left - costing[a] - costing[b])

    for n in range(MOST_PAIRS):
        now = costs[units, levels]
        left = np.array(knapsack.budgets, dtype=costs.dtype) - now.sum(0)
        if not (short := outside(left)):
            break
        costing = (costs - now[:, None])[unit, level]
        added = distances[unit, level] - distances[units, levels][unit]
        order = _distinct(costing, added, key)
        of, to, costing, added, changes = unit[order], level[order], costing[order], added[order], np.arange(len(order))
        begin, end = partners(left)
        a, b, after = meeting(left, begin, end)
        if not after.all():
            best = int(np.argmin(np.where(after == 0, added[a] + added[b], np.inf)))
            taken = [a[best], b[best]]
        else:
            near = np.clip(np.stack([begin - 1, begin, end]), 0, len(order) - 1)
            c, d = np.broadcast_to(changes, near.shape).ravel(), near.ravel()
            after = np.r_[after, np.where(of[c] == of[d], np.inf, outside(left - costing[c] - costing[d]))]
            a, b, best = np.r_[a, c], np.r_[b, d], int(np.argmin(after))
            taken = [a[best], b[best]] if after[best] < short else []
        if not taken:
            for third in np.argsort(added, kind="stable"):
                a, b, after = meeting(left - costing[third], *partners(left - costing[third]))
                good = (of[a] != of[third]) & (of[b] != of[third]) & (after == 0)
                if good.any():
                    best = int(np.argmin(np.where(good, added[a] + added[b], np.inf)))
                    taken = [third, a[best], b[best]]
                    break
            else:
                cheapest = np.argsort(np.where((costing == 0).all(-1), np.inf, added), kind="stable")
                taken = [cheapest[n % len(cheapest)]]
        for change in taken:
            levels[of[change]] = int(to[change])
    return levels


def _distinct(costing: Any, added: Any, key: int) -> Any:
    """Changes in order of the key resource; of those that cost the same, the ones that add least distance.

    The rest could matter only where one unit has several changes of one cost.
    """
    others = [costing[:, r] for r in range(costing.shape[1]) if r != key]
    order = np.lexsort((added, *others, costing[:, key]))
    ordered = costing[order]
    fresh = np.flatnonzero(np.r_[True, (ordered[1:] != ordered[:-1]).any(-1)])
    rank = np.arange(len(order)) - np.repeat(fresh, np.diff(np.r_[fresh, len(order)]))
    return order[rank < ALIKE]


def _nearest(knapsack: Knapsack, wish: list[float], ties: Sequence[float]) -> list[int]:
    """The feasible assignment of least total distance, by dynamic programming over the costs of all resources."""
    options, tables, exact = knapsack.counter.table
    shape = tables[0].shape
    best = np.full(shape, np.inf)
    best[tables[-1] > 0] = 0.0
    choices = []
    scale = 1e-9 / (max(ties) or 1)
    for i in range(len(options) - 1, -1, -1):
        following, choice = np.full(shape, np.inf), np.zeros(shape, dtype=np.int16)
        for pick, level in enumerate(options[i]):
            if any(c >= s for c, s in zip(level, shape, strict=True)):
                continue
            distance = abs(pick + knapsack.lowest[i] - wish[i]) * (1 + scale * ties[i])
            source = tuple(slice(c, None) for c in level)
            target = tuple(slice(None, s - c) for c, s in zip(level, shape, strict=True))
            better = best[source] + distance < following[target]
            following[target] = np.where(better, best[source] + distance, following[target])
            choice[target] = np.where(better, pick, choice[target])
        best = following
        choices.append(choice)
    spent, result = (0,) * len(shape), []
    if not np.isfinite(best[spent]):
        raise InfeasibleError("no assignment is within floor and budget: widen them")
    for i, choice in enumerate(reversed(choices)):
        pick = int(choice[spent])
        result.append(pick + knapsack.lowest[i])
        spent = tuple(a + b for a, b in zip(spent, options[i][pick], strict=True))
    if not exact and not knapsack.feasible(result):
        raise InfeasibleError("floor and budget are closer than the grid of costs resolves: widen them")
    return result
