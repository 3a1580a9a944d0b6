"""Writing a level store, one unit at a time; a build that was killed goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from evo_hpo.errors import StoreError
from evo_hpo.files import GROWING, file_lock, write_whole
from evo_hpo.levels.compressor import CompressedLevel
from evo_hpo.levels.manifest import LevelRecord, Manifest, Recipe, UnitRecord, checksum, missing_bytes, versions
from evo_hpo.levels.packing import Encoded, decode_record
from evo_hpo.models.paths import made_folder

_log = logging.getLogger("evo_hpo")

LEFT = 3600.0
"""Seconds after which nobody is still at a file that is half written."""


class StoreWriter:
    """The store under construction in `folder`; a context, in which no other process builds it.

    Units whose files are there, and hold what was written, are not built again: after a build that was killed, and in
    a store that lost files.

    Raises:
        StoreError: the folder holds a store, or the begin of one, with another plan.
    """

    def __init__(self, folder: Path, plan: Recipe) -> None:
        self.folder = folder
        self.plan = plan
        self._begun = folder / "build.json"
        self._log = folder / "built.jsonl"  # what was written: unit, bytes, CRC-32
        self._contents: dict[str, tuple[int, int]] = {}  # the same, with what a manifest says
        self._records: dict[str, UnitRecord] = {}
        self._lock = contextlib.ExitStack()
        self._manifest = self._checked()

    def __enter__(self) -> Self:
        made_folder(self.folder / "units")
        with contextlib.ExitStack() as failed:
            failed.callback(self._lock.close)
            self._alone()
            self._manifest = self._checked()
            if not self._begun.is_file():
                write_whole(self._begun, json.dumps(self.plan.to_json(), indent=1))
            self._begin_log()
            self._sweep()
            self._contents = self._known()
            failed.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def whole(self) -> Manifest | None:
        """The manifest, where the store is complete and no file is missing or of another size."""
        found = self._manifest
        return None if found is None or any(missing_bytes(self.folder, record) for record in found.units) else found

    def _alone(self) -> None:
        path = self.folder / "build.lock"
        try:
            if not self._lock.enter_context(file_lock(path, wait=False)):
                _log.warning("another process builds %s: waiting for it", self.folder)
                self._lock.enter_context(file_lock(path))
        except OSError as error:
            raise StoreError(
                f"{str(path)!r} cannot be written ({error.strerror}): let the folder's owner go on with the build, or"
                " use another folder"
            ) from error

    def _begin_log(self) -> None:
        """A build that an earlier version began has none: what is there, and can be read, is taken for written."""
        if self._log.is_file() or self._manifest:
            return
        there = (self._read(path.stem) for path in sorted((self.folder / "units").glob("*.safetensors")))
        write_whole(self._log, "".join(_line(record) for record in there if record is not None))

    def _sweep(self) -> None:
        """Removes what killed processes left half written, long ago: not every file system keeps others out."""
        for left in (self.folder / "units").glob(f".*{GROWING}"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > LEFT:
                    left.unlink()

    def _checked(self) -> Manifest | None:
        """The manifest, where there is one.

        Raises:
            StoreError: the folder holds something else than this store or a part of it.
        """
        manifest = Manifest.read(self.folder) if (self.folder / "manifest.json").is_file() else None
        if manifest:
            recorded = manifest.plan
        elif self._begun.is_file():
            try:
                recorded = Recipe.from_json(json.loads(self._begun.read_text()))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise StoreError(
                    f"damaged file {str(self._begun)!r} ({error}): delete the folder and build again"
                ) from error
        elif any((self.folder / "units").glob("*.safetensors")):
            raise StoreError(
                f"{str(self.folder)!r} holds levels of layers, but neither manifest.json nor build.json says of which"
                " store: use another folder or delete it"
            )
        else:
            return None
        if different := recorded.differences(Recipe.from_json(self.plan.to_json())):
            raise StoreError(
                f"{str(self.folder)!r} holds a store with other {different}: use another folder or delete it"
            )
        return manifest

    def _known(self) -> dict[str, tuple[int, int]]:
        """Unit -> bytes and CRC-32 of its file, by the manifest and by the log of a build."""
        units = self._manifest.units if self._manifest else ()
        found = {record.name: (record.bytes, record.crc32) for record in units}
        for line in self._log.read_text().splitlines() if self._log.is_file() else ():
            with contextlib.suppress(ValueError):  # cut off
                name, size, crc32 = json.loads(line)
                found[name] = (size, crc32)
        return found

    def done(self, name: str) -> bool:
        """Whether the unit is already written (its file is complete whenever it exists)."""
        if name not in self._records and self._path(name).is_file():
            record = self._read(name)
            if record is not None and self._is_as_written(record):
                self._records[name] = record
        return name in self._records

    def _is_as_written(self, record: UnitRecord) -> bool:
        content = (record.bytes, record.crc32)
        if self._contents.get(record.name) != content:  # another process wrote it, where nobody is kept out?
            self._manifest = self._checked()
            self._contents = self._known()
        return self._contents.get(record.name) == content

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
        self._note(self._records[name])

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
        self.end(manifest)
        return manifest

    def end(self, manifest: Manifest) -> None:
        """Write this manifest; the build is over."""
        manifest.write(self.folder)
        for ended in (self._log, self.folder / "build.lock"):  # who waits for the lock finds the manifest
            ended.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / "units" / f"{name}.safetensors"

    def _complete(self, record: UnitRecord) -> UnitRecord:
        path = self._path(record.name)
        return replace(record, file=f"units/{path.name}", bytes=path.stat().st_size, crc32=checksum(path))

    def _note(self, record: UnitRecord) -> None:
        with self._log.open("a") as log:  # one short write, whole beside those of other threads
            log.write(_line(record))

    def _read(self, name: str) -> UnitRecord | None:
        try:
            with safe_open(self._path(name), framework="pt") as file:
                return self._complete(UnitRecord.from_json(json.loads(file.metadata()["record"])))
        except (SafetensorError, KeyError, TypeError, ValueError):
            return None


def _line(record: UnitRecord) -> str:
    """Of the log."""
    return json.dumps([record.name, record.bytes, record.crc32]) + "\n"


def _settings(level: CompressedLevel) -> dict[str, object]:
    encoded: Encoded = level.encoded
    return encoded.settings()
