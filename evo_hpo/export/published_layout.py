"""The layout of the published implementation: `<layer>/<level>.pth` with dense tensors, and `layer: level` text files.

Reading it scores published profiles here; writing it runs ours there. Levels are named by an integer: bits of a
quantized layer, or steps of a sparse one (costs then come from the weights).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from evo_hpo.errors import InvalidSettingError, StoreError
from evo_hpo.levels.level_set import Choice, LevelSet
from evo_hpo.levels.manifest import LevelRecord, UnitRecord, checksum
from evo_hpo.levels.store import LevelStore
from evo_hpo.models.structure import is_linear


class PublishedFolder:
    """Decodes levels from `<layer>/<level>.pth`, loaded at first use."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self._weights: dict[tuple[str, str], torch.Tensor] = {}

    def unit_weights(self, unit: str, label: str) -> Mapping[str, torch.Tensor | None]:
        """The weight of one layer at one level, as it was saved."""
        if (unit, label) not in self._weights:
            self._weights[unit, label] = _load(self.folder / unit / f"{label}.pth").to(self.dtype)
        return {unit: self._weights[unit, label]}

    def unit_encoded(self, unit: str, label: str) -> None:
        """Nothing is packed."""


def open_published(folder: str | Path, resource: str, model: nn.Module, dtype: torch.dtype = torch.float32) -> LevelSet:
    """Open a folder in the published layout.

    Args:
        resource: "bits" (levels are named by their bits) or "weights" (the cost of a level is its non-zero weights).
        model: whose layers they are; units come in the order of its modules, since folders have none.

    Raises:
        StoreError: nothing is found, a file cannot be read or does not fit the model; the message names it.
    """
    if resource not in ("bits", "weights"):
        raise InvalidSettingError(f"resource={resource!r} must be 'bits' or 'weights'")
    root = Path(folder).expanduser()
    source = PublishedFolder(root, dtype)
    found = {path.parent.name for path in root.glob("*/*.pth")}
    if not found:
        raise StoreError(f"no <layer>/<level>.pth in {str(root)!r}: name the folder that holds one folder a layer")
    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules() if is_linear(module)}
    if unknown := sorted(found - set(shapes)):
        raise StoreError(f"{str(root / unknown[0])!r} is no linear layer of the model: name the model it was made from")
    rows = []
    for layer in (root / name for name in shapes if name in found):
        shape = shapes[layer.name]
        levels = [_level(path, resource, shape) for path in layer.glob("*.pth")]
        digest = 0
        for path in sorted(layer.glob("*.pth")):
            digest ^= checksum(path)
        size = int(torch.Size(shape).numel())
        record = UnitRecord(layer.name, (layer.name,), shape, size, False, tuple(levels), crc32=digest)
        rows.append((layer.name, [[Choice(source, record, level)] for level in levels]))
    return LevelSet(rows, resource)


def write_published(store: LevelStore, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write every level of a store as dense tensors; labels that are not integers become 0, 1, ... (cheapest first)."""
    for number, unit in enumerate(store.units):
        target = Path(folder) / unit.name
        target.mkdir(parents=True, exist_ok=True)
        for level, name in enumerate(_integer_names(unit.levels)):
            weight = store.weights(number, level).get(unit.name)
            if weight is None:
                raise StoreError(f"level {unit.levels[level]!r} of {unit.name!r} has no weights: nothing to write")
            torch.save(weight.to(dtype).clone(), target / f"{name}.pth")


def write_level_lines(path: str | Path, levels: LevelSet | LevelStore, assignment: Sequence[int]) -> None:
    """Write one `layer: level` line for each unit (for each member of a tied unit)."""
    lines = [
        f"{member}: {_integer_names(unit.levels)[level]}\n"
        for unit, level in zip(levels.units, assignment, strict=True)
        for member in unit.members
    ]
    Path(path).write_text("".join(lines))


def read_level_lines(path: str | Path, levels: LevelSet | LevelStore) -> tuple[int, ...]:
    """The assignment that a `layer: level` file describes.

    Raises:
        StoreError: a layer or a level is unknown or missing, or tied layers differ.
    """
    found = {}
    for line in Path(path).read_text().splitlines():
        if line.strip():
            layer, _, level = line.rpartition(":")
            found[layer.strip()] = level.strip()
    assignment = []
    for unit in levels.units:
        named = {found.pop(member, None) for member in unit.members}
        names = _integer_names(unit.levels)
        if len(named) != 1 or (name := named.pop()) not in names:
            raise StoreError(f"{str(path)!r} must give {unit.name!r} one of the levels {', '.join(names)}")
        assignment.append(names.index(str(name)))
    if found:
        raise StoreError(f"{str(path)!r} names {next(iter(found))!r}, which the store does not have")
    return tuple(assignment)


def _level(path: Path, resource: str, shape: tuple[int, ...]) -> LevelRecord:
    weight = _load(path)
    if tuple(weight.shape) != shape:
        raise StoreError(f"{str(path)!r} holds a tensor of shape {tuple(weight.shape)}, the model's layer has {shape}")
    if resource == "bits" and not path.stem.isdigit():
        raise StoreError(f"{str(path)!r} must be called by its bits, a whole number: rename it, or count weights")
    kept = int(weight.count_nonzero()) if resource == "weights" else weight.numel()
    bits = int(path.stem) * weight.numel() if resource == "bits" else 16 * kept
    stored = 8 * weight.numel() * weight.element_size()
    return LevelRecord(path.stem, bits, kept, 1, stored, float("nan"), {"kind": "dense"})


def _load(path: Path) -> torch.Tensor:
    try:
        weight = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise StoreError(f"cannot read {str(path)!r} ({type(error).__name__}): it must hold one tensor") from error
    if not isinstance(weight, torch.Tensor):
        raise StoreError(f"{str(path)!r} holds {type(weight).__name__}, not a tensor")
    return weight


def _integer_names(labels: Sequence[str]) -> list[str]:
    if all(label.lstrip("+-").isdigit() for label in labels):
        return [str(int(label)) for label in labels]
    return [str(number) for number in range(len(labels))]
