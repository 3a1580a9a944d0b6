"""Depth pruning: units that are kept or dropped; exact, since a dropped module contributes nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.manifest import LevelRecord, Manifest, Recipe, UnitRecord
from evo_hpo.levels.writing import StoreWriter
from evo_hpo.models.dropping import check_droppable
from evo_hpo.models.gates import example_tokens
from evo_hpo.models.loading import LoadedModel
from evo_hpo.models.structure import droppable_modules

KINDS = ("attention", "mlp", "block", "pair")


def build_drop_store(
    loaded: LoadedModel, folder: Path, kinds: Sequence[str] = ("attention", "mlp"), may_drop: str = "."
) -> Manifest:
    """Write a store whose units have the levels "dropped" and "kept".

    Args:
        loaded: the model.
        folder: of the store.
        kinds: attention and MLP modules, or whole blocks, or pairs of consecutive blocks.
        may_drop: regular expression; modules whose name does not contain it are always kept, and are no units.

    Raises:
        InvalidSettingError: no kind, an unknown one, one twice, blocks together with their own parts, nothing left to
            drop.
        ModelError: an architecture of which such modules cannot be left out.
    """
    records = records_of(loaded.model, kinds, may_drop)
    members = {member for record in records for member in record.members}
    check_droppable(loaded.model, members, example_tokens(loaded.model))
    plan = Recipe(
        model=loaded.name,
        identity=dict(loaded.identity),
        method="drop",
        settings={"kinds": list(kinds), "may_drop": may_drop},
        calibration={},
        units=tuple(record.name for record in records),
        resource="modules",
    )
    writer = StoreWriter(folder, plan)
    if found := writer.whole():
        return found
    with writer:
        return writer.finish(records)


def records_of(model: nn.Module, kinds: Sequence[str], may_drop: str = ".") -> tuple[UnitRecord, ...]:
    """What such a store holds of a model, in running order; arguments and errors as of :func:`build_drop_store`."""
    check_kinds(kinds)
    found = [droppable_modules(model, kind) for kind in kinds]
    units = [unit for same in zip(*(each.items() for each in found), strict=True) for unit in same]
    chosen = [(name, members) for name, members in units if re.search(may_drop, name)]
    if not chosen:
        raise InvalidSettingError(
            f"may_drop={may_drop!r} matches none of {len(units)} modules, such as {units[0][0]!r}"
        )
    return tuple(_record(model, name, members) for name, members in chosen)


def check_kinds(kinds: Sequence[str]) -> None:
    """Raises InvalidSettingError for no kind, an unknown one, one twice, or blocks together with their own parts."""
    once = len(set(kinds)) == len(kinds)
    if not kinds or not once or set(kinds) - set(KINDS) or (set(kinds) & {"block", "pair"} and len(kinds) > 1):
        raise InvalidSettingError(
            f"kinds={list(kinds)} must be 'attention' and/or 'mlp', each once, or 'block' or 'pair' alone"
        )


def _record(model: nn.Module, name: str, members: tuple[str, ...]) -> UnitRecord:
    size = sum(p.numel() for member in members for p in model.get_submodule(member).parameters() if p.dim() >= 2)
    levels = (
        LevelRecord("dropped", 0, 0, 0, 0, 1.0, {"kind": "dropped"}),
        LevelRecord("kept", 16 * size, size, 1, 16 * size, 0.0, {"kind": "kept"}),
    )
    return UnitRecord(name, members, (), size, False, levels)
