"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """A free name beside ``path``: the file or folder made there takes its place, or is removed where that fails."""
    growing = path.with_name(f".{uuid.uuid4().hex[:8]}.growing")
    try:
        yield growing
        os.replace(growing, path)
    except BaseException:  # on a full disk a part of it would take the rest
        if growing.is_dir():
            shutil.rmtree(growing, ignore_errors=True)
        else:
            growing.unlink(missing_ok=True)
        raise


def as_readable_as(path: Path, others: Iterable[Path]) -> None:
    """Gives other files a file's permissions: those that safetensors writes are the owner's alone."""
    mode = stat.S_IMODE(path.stat().st_mode)
    for other in others:
        other.chmod(mode)


def write_whole(path: Path, data: str | bytes) -> Path:
    """Writes a file: a reader meets the old one or the new one, after a crash too."""
    with made_whole(path) as growing, growing.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    return path
