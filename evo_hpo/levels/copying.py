"""A level store brought here from another machine, file by file, each checked by its content."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from evo_hpo.errors import StoreError
from evo_hpo.files import made_whole
from evo_hpo.levels.manifest import Manifest, UnitRecord, checksum
from evo_hpo.levels.writing import StoreWriter


def copied(folder: Path, manifest: bytes, read: Callable[[UnitRecord], Iterable[bytes]]) -> Manifest:
    """Makes the store in `folder` the one with this manifest; a copy that was cut off goes on where it stopped.

    Args:
        manifest: content of the manifest.json to copy.
        read: a unit's file, in parts; called for files that are not here, or not whole.

    Raises:
        StoreError: another store is in the folder, or a file came damaged.
    """
    wanted = Manifest.of(manifest, "of the store to copy")
    if (folder / "manifest.json").is_file():
        if Manifest.read(folder).units != wanted.units:
            raise StoreError(f"{str(folder)!r} holds another store than the one that is searched: delete it")
        return wanted
    with StoreWriter(folder, wanted.plan) as writer:  # refuses what is begun there of another store
        for record in wanted.units:
            path = folder / record.file
            if record.file and not _whole(path, record):
                with made_whole(path) as growing:
                    with growing.open("wb") as file:
                        file.writelines(read(record))
                    if not _whole(growing, record):
                        raise StoreError(f"{record.file!r} came damaged to {str(folder)!r}: try again")
        writer.end(wanted)
    return wanted


def _whole(path: Path, record: UnitRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.bytes and checksum(path) == record.crc32
