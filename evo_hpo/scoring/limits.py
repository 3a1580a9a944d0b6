"""Budgets beside bits or bytes: milliseconds a token, and the bytes of some of the blocks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evo_hpo.errors import InfeasibleError, InvalidSettingError
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.scoring.footprint import ModelShape, configuration
from evo_hpo.scoring.latency_table import LatencyTable
from evo_hpo.space.amounts import Amount, milliseconds, nanoseconds, shown
from evo_hpo.space.compression_space import CompressionSpace

TIME = "nanoseconds a token in searched layers"


@dataclass(frozen=True)
class Part:
    """Blocks of the model, and the most bytes that their searched layers may take together."""

    name: str
    first: int
    last: int
    size: str

    @classmethod
    def of(cls, name: str, entry: Any) -> Part:
        """From ``{ blocks = [0, 19], size = "60 MB" }``.

        Raises:
            InvalidSettingError: something else.
        """
        if not isinstance(entry, Mapping) or set(entry) != {"blocks", "size"}:
            raise InvalidSettingError(f"parts.{name}={entry!r} must be {{ blocks = [first, last], size = '60 MB' }}")
        blocks, size = entry["blocks"], entry["size"]
        if not (
            isinstance(blocks, Sequence)
            and len(blocks) == 2
            and all(isinstance(b, int) and not isinstance(b, bool) for b in blocks)
            and 0 <= blocks[0] <= blocks[1]
        ):
            raise InvalidSettingError(f"parts.{name}: blocks={blocks!r} must be [first, last], counted from 0")
        Amount.of(str(size), f"parts.{name}: size", relative=False)
        return cls(name, blocks[0], blocks[1], str(size))


@dataclass(frozen=True)
class Limits:
    """What an assignment must keep beside its average or size; false where there is nothing.

    Attributes:
        latency: of a token, such as "12 ms"; the whole model's. Empty: none.
        table: file of a :class:`LatencyTable`.
        parts: their blocks and sizes.
    """

    latency: str = ""
    table: str = ""
    parts: tuple[Part, ...] = ()

    @classmethod
    def of(cls, latency: str, table: str, parts: Mapping[str, Any]) -> Limits:
        """From a plan's settings.

        Raises:
            InvalidSettingError: one makes no sense, latency or its table is missing, or two parts have a block.
        """
        if bool(latency) != bool(table):
            raise InvalidSettingError(
                f"latency={latency!r} and latency_table={table!r} need each other: a budget such as '12 ms', and the"
                " table that evo-hpo latency measures"
            )
        if latency:
            nanoseconds(latency)
        found = sorted((Part.of(name, entry) for name, entry in parts.items()), key=lambda part: part.first)
        for one, other in itertools.pairwise(found):
            if other.first <= one.last:
                raise InvalidSettingError(f"block {other.first} is on the parts {one.name!r} and {other.name!r}")
        return cls(latency, table, tuple(found))

    def __bool__(self) -> bool:
        return bool(self.latency or self.parts)

    def __len__(self) -> int:
        """Number of resources that they add."""
        return bool(self.latency) + len(self.parts)

    def check(self, model: str) -> None:
        """Raises InvalidSettingError where the table cannot be read or is of another model, before levels are built."""
        if self.latency:
            self._table(model)

    def _table(self, model: str) -> LatencyTable:
        found = LatencyTable.read(self.table)
        found.check_model(ModelShape.of(configuration(model)))
        return found

    def applied(self, model: str, levels: LevelSet, space: CompressionSpace) -> CompressionSpace:
        """A space of these levels with one more resource a limit.

        Raises:
            InvalidSettingError: the table is of another model or lacks a level, or a part has blocks that are not.
            InfeasibleError: a limit is out of reach; the message tells what is not.
        """
        costs, budgets, names = [], [], []
        if self.latency:
            table = self._table(model)
            costs.append(table.costs(levels))
            budgets.append(self._left(table, levels))
            names.append(TIME)
        for part in self.parts:
            costs.append(_bytes_on(part, levels))
            budgets.append(Amount.of(part.size).total(0))
            names.append(f"bytes of {part.name}")
            least = sum(min(levels) for levels in costs[-1])
            if budgets[-1] < least:
                raise InfeasibleError(
                    f"parts.{part.name}: size={part.size!r} is below what its blocks take at least,"
                    f" {shown(least)}: raise it, or move blocks to another part"
                )
        found = _extended(space, costs, budgets, names)
        try:
            found.uniform()
        except InfeasibleError:
            raise InfeasibleError(self._together(space, costs, budgets, names)) from None
        return found

    def _left(self, table: LatencyTable, levels: LevelSet) -> int:
        """Nanoseconds that the searched layers may take."""
        budget = nanoseconds(self.latency)
        least, most = table.reach(levels)
        if budget < least:
            raise InfeasibleError(
                f"latency={self.latency!r} is out of reach: the levels take {milliseconds(least)} to"
                f" {milliseconds(most)} a token ({table.place}), {milliseconds(table.rest)} of it attention, embedding,"
                " head and norms"
            )
        return budget - table.rest

    def _together(
        self,
        space: CompressionSpace,
        costs: Sequence[Sequence[tuple[int, ...]]],
        budgets: Sequence[int],
        names: Sequence[str],
    ) -> str:
        """Why nothing keeps all budgets, though each alone can be kept."""
        first = f"{space.budget} {space.resources[0]}"
        for own, budget, name in zip(costs, budgets, names, strict=True):
            least = least_within(space, own)
            if least > budget:
                return (
                    f"within {first} the least that was found is {least} {name}, the budget is {budget}: raise one of"
                    " them"
                )
        return f"no assignment keeps {first} and all of {', '.join(names)}: raise a budget"


def _bytes_on(part: Part, levels: LevelSet) -> list[tuple[int, ...]]:
    """Bytes of each unit's levels where its block lies on a part, else 0."""
    units = levels.units
    there = [unit.block is not None and part.first <= unit.block <= part.last for unit in units]
    last = max((unit.block for unit in units if unit.block is not None), default=-1)
    if part.last > last:
        raise InvalidSettingError(
            f"parts.{part.name}: blocks=[{part.first}, {part.last}] must end at {last}, the model's last"
        )
    return [
        tuple(sum(choice.cost("bytes") for choice in level) if on else 0 for level in choices)
        for on, (_, choices) in zip(there, levels.rows(), strict=True)
    ]


def _extended(
    space: CompressionSpace,
    costs: Sequence[Sequence[tuple[int, ...]]],
    budgets: Sequence[int],
    names: Sequence[str],
) -> CompressionSpace:
    """The space with further resources; ``costs``: of each resource, each unit's levels."""
    units = []
    for unit, known, further in zip(space.units, space.vectors, zip(*costs, strict=True), strict=True):
        rows = zip(known, *further, strict=True)
        units.append(replace(unit, costs=tuple((*first, *others) for first, *others in rows)))
    return CompressionSpace(
        units,
        (*space.budgets, *budgets),
        floor=(*space.floors, *[0] * len(budgets)),
        resources=(*space.resources, *names),
    )


def least_within(space: CompressionSpace, costs: Sequence[Sequence[int]]) -> int:
    """About the least total of costs that an assignment within the first budget can have (from above).

    By Lagrange's multiplier: the levels of least cost plus a price for the budget's resource, at the lowest price at
    which they keep the budget.
    """
    padded = max(map(len, costs))
    own = np.array([[*row, *[row[-1]] * (padded - len(row))] for row in costs], dtype=float)
    paid = np.array([[c[0] for c in (*row, *[row[-1]] * (padded - len(row)))] for row in space.vectors], dtype=float)
    rows, low, high = np.arange(len(own)), 0.0, 1.0

    def chosen(price: float) -> Any:
        return np.argmin(own + price * paid, axis=1)

    while paid[rows, chosen(high)].sum() > space.budget and high < 1e18:
        high *= 2
    for _ in range(60):
        price = (low + high) / 2
        low, high = (low, price) if paid[rows, chosen(price)].sum() <= space.budget else (price, high)
    return int(own[rows, chosen(high)].sum())
