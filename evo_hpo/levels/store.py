"""The level store: one folder of memory-mapped safetensors with every level of every unit.

manifest.json                 plan, versions, and a record for each unit: levels, costs, errors, checksum
units/<module>.safetensors    all levels of one module, bit-packed
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from evo_hpo.errors import InvalidSettingError, StoreError
from evo_hpo.levels.level_set import Choice, LevelSet
from evo_hpo.levels.manifest import Manifest, UnitRecord, checksum, missing_bytes
from evo_hpo.levels.packing import Encoded, decode_record
from evo_hpo.models.identity import differences, warn_unchecked
from evo_hpo.models.paths import user_path
from evo_hpo.space.compression_space import CompressionSpace, Unit

Memory = Literal["resident", "packed", "streamed"] | int


class LevelStore:
    """A complete store; implements `Levels` with one unit for each module.

    Args:
        dtype: compute dtype of decoded weights.
        memory: "resident" keeps every level decoded (fastest switch); "packed" keeps the packed form and decodes at
            every switch; "streamed" keeps it in main memory, whatever the device; a number keeps that many bytes of
            decoded levels, least recently used out first.
        device: where decoded weights live, or of which module.

    Raises:
        StoreError: a file is missing or damaged; the message names it.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, memory: Memory, device: str | Callable[[str], str]) -> None:
        if memory not in ("resident", "packed", "streamed") and not isinstance(memory, int):
            raise InvalidSettingError(
                f"memory={memory!r} must be 'resident', 'packed', 'streamed' or a number of bytes"
            )
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.dtype = dtype
        self._device = device if callable(device) else lambda _: device
        self._waits = memory == "streamed"
        self._limit = (None if memory == "resident" else 0) if isinstance(memory, str) else memory
        self._records = {record.name: record for record in self.manifest.units}
        self._packed: dict[str, dict[str, Encoded]] = {}
        self._checked: set[str] = set()
        self._decoded: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._check_sizes()
        rows = [(r.name, [[Choice(self, r, level)] for level in r.levels]) for r in self.manifest.units]
        self.levels = LevelSet(rows, self.manifest.plan.resource)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        memory: Memory = "resident",
        device: str | Callable[[str], str] = "cpu",
        model: Mapping[str, str] | None = None,
    ) -> LevelStore:
        """Open a store; with the identity of a `model`, refuse one that was built from another."""
        store = cls(user_path(folder), dtype, memory, device)
        built_from = store.manifest.plan.identity
        if model is not None and not built_from:
            warn_unchecked(f"the store {str(folder)!r}")
        elif model is not None and (other := differences(built_from, model)):
            raise StoreError(f"{str(folder)!r} was built from another model: {other}; rebuild it or name another store")
        return store

    # ------------------------------------------------------------------ Levels

    @property
    def units(self) -> Sequence[Unit]:
        """One unit for each module (or group of modules) of the store."""
        return self.levels.units

    @property
    def fingerprint(self) -> str:
        """Identifies the weights of every level."""
        return self.levels.fingerprint

    @property
    def errors(self) -> tuple[tuple[float, ...], ...]:
        """Layer-wise relative error of each level of each unit."""
        return self.levels.errors

    def weights(self, unit: int, level: int) -> Mapping[str, torch.Tensor | None]:
        """Weights of one level of one unit; see `Levels`."""
        return self.levels.weights(unit, level)

    def encoded(self, unit: int, level: int) -> Mapping[str, Encoded]:
        """The same as they are stored; see `Levels`."""
        return self.levels.encoded(unit, level)

    def space(self, average: float | str | None = None, **settings: Any) -> CompressionSpace:
        """The search space of the store; see `LevelSet.space`."""
        return self.levels.space(average, **settings)

    # ------------------------------------------------------------------ weights

    def unit_weights(self, unit: str, label: str) -> Mapping[str, torch.Tensor | None]:
        """Weights of one unit at the level with this label."""
        key = (unit, label)
        weight = self._decoded.get(key)
        if weight is not None:
            if self._limit is not None:
                self._decoded.move_to_end(key)
            return {unit: weight}
        record = self._records[unit]
        settings = next(level.settings for level in record.levels if level.label == label)
        if settings["kind"] == "kept":
            return {}
        if settings["kind"] == "dropped":
            return dict.fromkeys(record.members)
        weight = self._decode(record, label)
        self._remember(key, weight)
        return {unit: weight}

    def unit_encoded(self, unit: str, label: str) -> Encoded | None:
        """One level of one unit as it is stored; None where it is kept or dropped."""
        record = self._records[unit]
        return self._encoded(record).get(label) if record.file else None

    def _decode(self, record: UnitRecord, label: str) -> torch.Tensor:
        weight = self._encoded(record)[label].to(self._device(record.name)).decode(self.dtype)
        return weight.T.contiguous() if record.transposed else weight

    def _encoded(self, record: UnitRecord) -> dict[str, Encoded]:
        """The unit's levels as they are stored: views of the mapped file, kept where they are decoded again."""
        if record.name in self._packed:
            return self._packed[record.name]
        if record.name not in self._checked:
            self._check_content(record)
            self._checked.add(record.name)
        try:
            tensors = load_file(self.folder / record.file, device="cpu" if self._waits else self._device(record.name))
            if self._waits and torch.cuda.is_available():  # copies to a GPU need not wait for each other
                tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
            found = {
                level.label: decode_record(
                    level.settings,
                    {k.partition("/")[2]: t for k, t in tensors.items() if k.startswith(f"{level.label}/")},
                )
                for level in record.levels
                if level.settings["kind"] not in ("kept", "dropped")
            }
        except (SafetensorError, KeyError) as error:
            raise StoreError(f"damaged file {record.file!r} in {str(self.folder)!r} ({error}): rebuild") from error
        if self._limit is not None:
            self._packed[record.name] = found
        return found

    def _remember(self, key: tuple[str, str], weight: torch.Tensor) -> None:
        if self._limit is None:
            self._decoded[key] = weight
            return
        size = weight.numel() * weight.element_size()
        if size > self._limit:
            return
        self._decoded[key] = weight
        self._bytes += size
        while self._bytes > self._limit:
            _, old = self._decoded.popitem(last=False)
            self._bytes -= old.numel() * old.element_size()

    def _check_sizes(self) -> None:
        for record in self.manifest.units:
            if wrong := missing_bytes(self.folder, record):
                raise StoreError(f"damaged store: {wrong}: build it again, which writes what is missing")

    def _check_content(self, record: UnitRecord) -> None:
        if checksum(self.folder / record.file) != record.crc32:
            raise StoreError(
                f"damaged store: {record.file!r} in {str(self.folder)!r} fails its checksum: delete that file and"
                " build again, which writes what is missing"
            )


def open_store(folder: str | Path, **settings: Any) -> LevelStore:
    """Open a level store; see `LevelStore.open`."""
    return LevelStore.open(folder, **settings)
