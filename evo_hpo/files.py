"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""Errors of file systems that have none: there nobody is kept out."""

GROWING = ".growing"
"""How names of files end that are not whole yet; those of a killed process stay."""


@contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """A free name beside ``path``: the file or folder made there takes its place, or is removed where that fails."""
    growing = path.with_name(f".{uuid.uuid4().hex[:8]}{GROWING}")
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


@contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds an exclusive lock on a file between processes; gives False when it is taken and ``wait`` is false."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # less the umask: others may go on
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        yield True
    finally:
        os.close(descriptor)
