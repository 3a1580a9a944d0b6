"""Units and levels of one or several stores, as a search space and as weights."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol

import torch

from evo_hpo.errors import InvalidSettingError, StoreError
from evo_hpo.levels.manifest import LevelRecord, UnitRecord
from evo_hpo.levels.masks import Sparsity, as_share
from evo_hpo.levels.packed_size import file_bytes
from evo_hpo.levels.packing import Encoded
from evo_hpo.models.structure import is_attention
from evo_hpo.space.compression_space import CompressionSpace, Unit

RESOURCES = ("bits", "weights", "modules", "storage", "bytes")


class ModuleWeights(Protocol):
    """Whoever can decode one level of one store unit."""

    def unit_weights(self, unit: str, label: str) -> Mapping[str, torch.Tensor | None]:
        """Module name -> weight (None: dropped; missing: original)."""

    def unit_encoded(self, unit: str, label: str) -> Encoded | None:
        """One level of one unit as it is stored; None where it is not, or is no compressed matrix."""


@dataclass(frozen=True)
class Choice:
    """One level of one unit: which store unit at which of its levels."""

    source: ModuleWeights
    unit: UnitRecord
    level: LevelRecord

    def cost(self, resource: str) -> int:
        """Exact integer cost of this choice."""
        return file_bytes(self.unit, self.level) if resource == "bytes" else int(getattr(self.level, resource))


class LevelSet:
    """An ordered set of units with their levels; implements `Levels`.

    Args:
        rows: for each unit its name and its levels; a level is one choice for each store unit that is tied to it.
        resource: what the budget counts: "bits" (nominal), "weights" (kept), "modules" (kept), "storage" (bits) or
            "bytes" (in the exported file).
    """

    def __init__(self, rows: Sequence[tuple[str, Sequence[Sequence[Choice]]]], resource: str) -> None:
        if resource not in RESOURCES:
            raise InvalidSettingError(f"resource={resource!r} must be one of: {', '.join(RESOURCES)}")
        self.resource = resource
        self._rows = [
            (name, sorted(levels, key=lambda level: (sum(c.cost(resource) for c in level), -_error(level))))
            for name, levels in rows
        ]
        self.units: Sequence[Unit] = tuple(_unit(name, levels, resource) for name, levels in self._rows)

    @property
    def fingerprint(self) -> str:
        """Identifies the weights of every level."""
        digest = hashlib.sha256(self.resource.encode())
        for name, levels in self._rows:
            digest.update(name.encode())
            for level in levels:
                for choice in level:
                    digest.update(f"{choice.unit.name}:{choice.unit.crc32}:{choice.level.label}".encode())
        return digest.hexdigest()[:16]

    @property
    def errors(self) -> tuple[tuple[float, ...], ...]:
        """Layer-wise relative error of each level of each unit (mean over tied layers, weighted by size)."""
        return tuple(tuple(_error(level) for level in levels) for _, levels in self._rows)

    def weights(self, unit: int, level: int) -> Mapping[str, torch.Tensor | None]:
        """Weights of one level of one unit; see `Levels`."""
        choices = self._rows[unit][1][level]
        if len(choices) == 1:
            return choices[0].source.unit_weights(choices[0].unit.name, choices[0].level.label)
        merged: dict[str, torch.Tensor | None] = {}
        for choice in choices:
            merged.update(choice.source.unit_weights(choice.unit.name, choice.level.label))
        return merged

    def encoded(self, unit: int, level: int) -> Mapping[str, Encoded]:
        """Module name -> weight as it is stored, outputs x inputs, of those that are."""
        found = ((c.unit.name, c.source.unit_encoded(c.unit.name, c.level.label)) for c in self._rows[unit][1][level])
        return {name: encoded for name, encoded in found if encoded is not None}

    def select(self, *, labels: Sequence[str] | None = None, include: str = ".") -> LevelSet:
        """Only the levels with these labels, of the units whose name contains the regular expression."""
        kept = [
            (name, [level for level in levels if labels is None or level[0].level.label in map(str, labels)])
            for name, levels in self._rows
            if re.search(include, name)
        ]
        if not kept or any(not levels for _, levels in kept):
            raise InvalidSettingError(f"labels={labels} include={include!r} leave nothing: see the store's manifest")
        return LevelSet(kept, self.resource)

    def tied(self, patterns: Mapping[str, str] | None = None) -> LevelSet:
        """Tie units that share a level, such as q, k and v (fused by fast kernels).

        Args:
            patterns: new name -> regular expression with one group around what must be equal for units to be tied.
                The default ties q, k and v of each attention, and gate and up of each MLP.
        """
        chosen = patterns or {"qkv_proj": r"(.*)\.[qkv]_proj$", "gate_up_proj": r"(.*)\.(?:gate|up)_proj$"}
        bundles: dict[str, list[list[Sequence[Choice]]]] = {}
        for name, levels in self._rows:
            bundles.setdefault(bundled(name, chosen), []).append(list(levels))
        rows = []
        for name, members in bundles.items():
            named = [{level[0].level.label: level for level in levels} for levels in members]
            shared = [label for label in named[0] if all(label in levels for levels in named)]
            if not shared:
                raise StoreError(f"units tied in {name!r} share no level: build them with the same levels")
            rows.append((name, [[choice for levels in named for choice in levels[label]] for label in shared]))
        return LevelSet(rows, self.resource)

    def with_dropped(self) -> LevelSet:
        """The same units with one more level each, "dropped", at no cost: the unit's modules contribute nothing.

        Embedding and head, which are in no block, have none.
        """
        rows = [
            (name, levels if unit.block is None else [_dropped(levels), *levels])
            for unit, (name, levels) in zip(self.units, self._rows, strict=True)
        ]
        return LevelSet(rows, self.resource)

    def counted_in(self, resource: str) -> LevelSet:
        """The same levels with another budget: one of those that the class names."""
        return LevelSet(self._rows, resource)

    def space(
        self,
        average: float | str | None = None,
        *,
        budget: int | None = None,
        sparsity: float | str | None = None,
        drop: int | Mapping[str, int] | None = None,
        floor: int = 0,
    ) -> CompressionSpace:
        """The search space; give exactly one of the following.

        Args:
            average: what the store is about: average bits a weight, sparsity of a sparse store, or number of modules
                dropped of a store of dropped modules.
            budget: total cost, in the set's resource.
            sparsity: share of all weights that is removed.
            drop: number of units that are dropped at least; or that of each group, as {"attention": 6, "mlp": 6}: one
                resource a group, so that no search can shift what is dropped from one group to another.
            floor: least total cost.

        Raises:
            InvalidSettingError: none or several of them given, or another resource than theirs, or unknown groups;
                a sparsity outside 0 to 1, or to drop no whole number of units, or more than there are.
        """
        given = {"average": average, "budget": budget, "sparsity": sparsity, "drop": drop}
        if sum(value is not None for value in given.values()) != 1:
            raise InvalidSettingError(f"give exactly one of {', '.join(given)}")
        if average is not None and self.resource == "weights":
            sparsity = average
        elif average is not None and self.resource == "modules":
            budget = self._kept(average)
        elif average is not None:
            return CompressionSpace.from_average(self.units, average, floor=floor, resources=(self.resource,))
        total = sum(unit.size for unit in self.units)
        if sparsity is not None:
            self._only("weights", "sparsity")
            share = as_share(sparsity)
            budget = max(math.floor((1 - share) * total), self._kept_at(share))
        elif isinstance(drop, Mapping):
            self._only("modules", "drop")
            if floor:
                raise InvalidSettingError(f"floor={floor} is one number, drop={dict(drop)} counts each group by itself")
            return self._dropping(drop)
        elif drop is not None:
            self._only("modules", "drop")
            budget = self._kept(drop)
        return CompressionSpace(self.units, int(budget or 0), floor=floor, resources=(self.resource,))

    def _kept_at(self, sparsity: Fraction) -> int:
        """Weights that uniform compression keeps where every unit has a level of this sparsity, else 0.

        Each layer rounds its number of kept weights. A few weights over the exact share, or uniform compression itself
        would be out of reach. Such a level is told by what it keeps, whatever it is called.
        """
        exact, total = Sparsity("", sparsity), 0
        for _, levels in self._rows:
            kept = [c.unit.size - exact.removed(c.unit.size) for c in levels[0]]
            if not any([c.level.weights for c in level] == kept for level in levels):
                return 0
            total += sum(kept)
        return total

    def _kept(self, drop: float | str) -> int:
        """Units that are kept where so many are dropped."""
        try:
            count = Fraction(str(drop))
        except (ValueError, ZeroDivisionError):
            count = Fraction(-1)
        if count.denominator != 1 or not 0 <= count <= len(self.units):
            raise InvalidSettingError(
                f"{drop!r} must be a whole number of units to drop, from 0 to {len(self.units)}, all that there are"
            )
        return len(self.units) - int(count)

    def _dropping(self, counts: Mapping[str, int]) -> CompressionSpace:
        """One resource a group: the modules of it that are kept."""
        groups = list(dict.fromkeys(str(unit.group) for unit in self.units))
        if sorted(counts) != sorted(groups):
            raise InvalidSettingError(f"drop={dict(counts)} must give a number for each of: {', '.join(groups)}")
        units, kept = [], dict.fromkeys(groups, 0)
        for unit in self.units:
            rows = [tuple(int(cost) if g == unit.group else 0 for g in groups) for cost in unit.costs]  # type: ignore[arg-type]
            units.append(replace(unit, costs=tuple(rows)))
            kept[str(unit.group)] += 1
        for group, count in counts.items():
            if not 0 <= count <= kept[group]:
                raise InvalidSettingError(f"drop={dict(counts)}: {group} has {kept[group]} modules to drop")
        return CompressionSpace(units, [kept[g] - counts[g] for g in groups], resources=groups)

    def _only(self, resource: str, what: str) -> None:
        if self.resource != resource:
            raise InvalidSettingError(f"{what}= needs levels counted in {resource}: use counted_in({resource!r})")

    def chosen(self, assignment: Sequence[int]) -> dict[str, Choice]:
        """Module of the model -> what an assignment chooses for it."""
        levels = (row[1][level] for row, level in zip(self._rows, assignment, strict=True))
        return {member: choice for level in levels for choice in level for member in choice.unit.members}

    def landmarks(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Name -> assignment and cost of the cheapest, of each level that all units have, of the dearest; ascending."""
        units = self.units
        found = {"lowest": tuple(0 for _ in units), "highest": tuple(len(unit.costs) - 1 for unit in units)}
        for label in units[0].levels:
            if all(label in unit.levels for unit in units):
                found[f"uniform {label}"] = tuple(unit.levels.index(label) for unit in units)
        counted = CompressionSpace(units, sum(unit.costs[-1] for unit in units))  # type: ignore[misc]
        costs = ((name, (assignment, counted.cost(assignment))) for name, assignment in found.items())
        return dict(sorted(costs, key=lambda row: row[1][1]))

    def rows(self) -> list[tuple[str, list[Sequence[Choice]]]]:
        """Unit names and their levels, cheapest first."""
        return [(name, list(levels)) for name, levels in self._rows]


class _Dropped:
    """Source of the levels that `with_dropped` adds."""

    def __init__(self, members: tuple[str, ...]) -> None:
        self._members = members

    def unit_weights(self, unit: str, label: str) -> Mapping[str, torch.Tensor | None]:
        return dict.fromkeys(self._members)

    def unit_encoded(self, unit: str, label: str) -> None:
        return None


def _dropped(levels: Sequence[Sequence[Choice]]) -> list[Choice]:
    """Beside these levels of one unit; its record is of a store with ggml types where there is one: they have zeros."""
    level = LevelRecord("dropped", 0, 0, 0, 0, 1.0, {"kind": "dropped"})
    records = {choice.unit.name: choice.unit for choice in levels[0]}
    records |= {c.unit.name: c.unit for row in levels for c in row if c.level.settings.get("kind") == "ggml"}
    return [Choice(_Dropped(unit.members), unit, level) for unit in records.values()]


def _unit(name: str, levels: Sequence[Sequence[Choice]], resource: str) -> Unit:
    settings: dict[str, Any] = {}
    if resource == "modules":
        settings["group"] = _group(name)
    members = tuple(dict.fromkeys(m for level in levels for choice in level for m in choice.unit.members))
    return Unit(
        name,
        costs=tuple(sum(choice.cost(resource) for choice in level) for level in levels),
        levels=tuple(level[0].level.label for level in levels),
        members=members,
        size=1 if resource == "modules" else sum(choice.unit.size for choice in levels[0]),
        **settings,
    )


def _group(name: str) -> str:
    """What is dropped with the unit: attention, or what else is in a block (whatever it is called), or whole blocks."""
    found = re.search(r"(?:^|\.)\d+\.(.+)", name)
    return "block" if found is None else "attention" if is_attention(found.group(1)) else "mlp"


def _error(level: Sequence[Choice]) -> float:
    total = sum(choice.unit.size for choice in level)
    return sum(choice.level.error * choice.unit.size for choice in level) / max(total, 1)


def bundled(name: str, patterns: Mapping[str, str]) -> str:
    """Name of the whole that a unit is tied to by the first expression that matches, or its own."""
    for bundle, pattern in patterns.items():
        if found := re.match(pattern, name):
            return f"{found.group(1)}.{bundle}"
    return name
