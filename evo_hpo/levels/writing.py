"""Writing a level store, one unit at a time; a build that was killed goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from evo_hpo.errors import StoreError
from evo_hpo.files import write_whole
from evo_hpo.levels.compressor import CompressedLevel
from evo_hpo.levels.manifest import LevelRecord, Manifest, Recipe, UnitRecord, checksum, versions
from evo_hpo.levels.packing import Encoded, decode_record
from evo_hpo.models.paths import made_folder


class StoreWriter:
    """The store under construction in `folder`.

    Raises:
        StoreError: the folder holds a build with another plan.
    """

    def __init__(self, folder: Path, plan: Recipe) -> None:
        self.folder = folder
        self.plan = plan
        made_folder(folder / "units")
        begun = folder / "build.json"
        if begun.is_file():
            try:
                recorded = Recipe.from_json(json.loads(begun.read_text()))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise StoreError(f"damaged file {str(begun)!r} ({error}): delete the folder and build again") from error
            self._check(recorded)
        else:
            write_whole(begun, json.dumps(plan.to_json(), indent=1))
        self._records: dict[str, UnitRecord] = {}

    def _check(self, found: Recipe) -> None:
        wanted = Recipe.from_json(self.plan.to_json())
        if different := found.differences(wanted):
            raise StoreError(
                f"{str(self.folder)!r} holds a store with other {different}: use another folder or delete it"
            )

    def done(self, name: str) -> bool:
        """Whether the unit is already written (its file is complete whenever it exists)."""
        if name not in self._records and self._path(name).is_file():
            record = self._read(name)
            if record is not None:
                self._records[name] = record
        return name in self._records

    def write(self, name: str, shape: tuple[int, ...], transposed: bool, levels: Sequence[CompressedLevel]) -> None:
        """Write all levels of one linear layer; shape is outputs x inputs."""
        size = shape[0] * shape[1]
        records = tuple(
            LevelRecord(v.label, v.bits, v.weights, int(v.weights > 0), v.encoded.storage_bits, v.error, _settings(v))
            for v in sorted(levels, key=lambda v: (v.bits, v.weights))
        )
        record = UnitRecord(name, (name,), shape, size, transposed, records)
        tensors = {f"{v.label}/{key}": t.contiguous() for v in levels for key, t in v.encoded.tensors().items()}
        write_whole(self._path(name), save(tensors, {"record": json.dumps(asdict(record))}))
        self._records[name] = self._complete(record)

    def decode(self, name: str, label: str, dtype: torch.dtype) -> torch.Tensor:
        """A level that is already written, in the module's own layout."""
        record = self._records[name]
        level = next(level for level in record.levels if level.label == label)
        with safe_open(self._path(name), framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(f"{label}/")]  # noqa: SIM118 (not a mapping)
            tensors = {key.partition("/")[2]: file.get_tensor(key) for key in keys}
        weight = decode_record(level.settings, tensors).decode(dtype)
        return weight.T.contiguous() if record.transposed else weight

    def finish(self, records: Sequence[UnitRecord] = ()) -> Manifest:
        """Write the manifest.

        Args:
            records: of units that need no file (modules that are kept or dropped).
        """
        complete = tuple(records) or tuple(self._records[name] for name in self.plan.units if self.done(name))
        missing = set(self.plan.units) - {record.name for record in complete}
        if missing:
            raise StoreError(f"{len(missing)} units were not built, the first is {min(missing)!r}: run the build again")
        manifest = Manifest(self.plan, complete, versions())
        manifest.write(self.folder)
        return manifest

    def _path(self, name: str) -> Path:
        return self.folder / "units" / f"{name}.safetensors"

    def _complete(self, record: UnitRecord) -> UnitRecord:
        path = self._path(record.name)
        return replace(record, file=f"units/{path.name}", bytes=path.stat().st_size, crc32=checksum(path))

    def _read(self, name: str) -> UnitRecord | None:
        try:
            with safe_open(self._path(name), framework="pt") as file:
                return self._complete(UnitRecord.from_json(json.loads(file.metadata()["record"])))
        except (SafetensorError, KeyError, TypeError, ValueError):
            return None


def _settings(level: CompressedLevel) -> dict[str, object]:
    encoded: Encoded = level.encoded
    return encoded.settings()
