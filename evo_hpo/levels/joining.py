"""Several stores' levels as one set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from evo_hpo.errors import StoreError
from evo_hpo.levels.level_set import Choice, LevelSet, ModuleWeights
from evo_hpo.levels.packing import Encoded


def joined(sets: Sequence[LevelSet], resource: str = "bits", prefixes: Sequence[str] | None = None) -> LevelSet:
    """One set with the levels of all: units of the same name offer every level of each (quantized, sparse or dropped).

    Args:
        resource: "bits" counts nominal bits (16 for each kept weight of a sparse layer, 0 where dropped).
        prefixes: put before each set's labels, to tell equal labels apart.

    Raises:
        StoreError: equal labels; or modules of one set hold those of another, which would be counted twice.
    """
    if len({each.resource == "modules" for each in sets}) > 1:
        raise StoreError("dropped modules cannot be joined with levels of their layers: drop these, tied to modules")
    names: dict[str, list[Sequence[Choice]]] = {}
    for number, each in enumerate(sets):
        prefix = prefixes[number] if prefixes else ""
        for name, levels in each.rows():
            names.setdefault(name, []).extend([_renamed(choice, prefix) for choice in level] for level in levels)
    rows = list(names.items())
    for name, levels in rows:
        labels = [level[0].level.label for level in levels]
        if len(set(labels)) != len(labels):
            raise StoreError(f"unit {name!r} has two levels with one label in {labels}: give prefixes=")
    found = LevelSet(rows, resource)
    _refuse_overlaps(found)
    return found


def _refuse_overlaps(levels: LevelSet) -> None:
    """No weight is a member, or inside of a member, of two units."""
    owner: dict[str, str] = {}
    for unit in levels.units:
        for member in unit.members:
            owner.setdefault(member, unit.name)
    for unit in levels.units:
        for member in unit.members:
            parts = member.split(".")
            for whole in (".".join(parts[:count]) for count in range(1, len(parts) + 1)):
                if (other := owner.get(whole, unit.name)) != unit.name:
                    raise StoreError(
                        f"units {other!r} and {unit.name!r} both hold {member!r}, whose weights would be counted twice:"
                        " join levels of the same units, and drop these (with_dropped, tied to modules)"
                    )


def _renamed(choice: Choice, prefix: str) -> Choice:
    if not prefix:
        return choice
    return Choice(
        _Renamed(choice.source, prefix), choice.unit, replace(choice.level, label=prefix + choice.level.label)
    )


@dataclass(frozen=True)
class _Renamed:
    source: ModuleWeights
    prefix: str

    def unit_weights(self, unit: str, label: str) -> Mapping[str, torch.Tensor | None]:
        return self.source.unit_weights(unit, label.removeprefix(self.prefix))

    def unit_encoded(self, unit: str, label: str) -> Encoded | None:
        return self.source.unit_encoded(unit, label.removeprefix(self.prefix))
