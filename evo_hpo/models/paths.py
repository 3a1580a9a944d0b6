"""Paths as users write them: `~` stands for their home, and a name that is none is refused before it is looked up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evo_hpo.errors import InvalidSettingError

LONGEST_NAME = 255
"""Bytes of a file's or folder's name that file systems take."""


def user_path(name: str | Path) -> Path:
    """The path called so.

    Raises:
        InvalidSettingError: no home is known for its `~`, or a part of it is longer than a file's name can be.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise InvalidSettingError(f"no home folder is known for {str(name)!r}: write the whole path") from None
    if longest := max(path.parts, key=len, default=""):
        size = len(longest.encode("utf-8", "surrogatepass"))
        if size > LONGEST_NAME:
            raise InvalidSettingError(
                f"{longest[:40]!r}... has {size} bytes: a name of a file or folder has at most {LONGEST_NAME}"
            )
    return path


def cache_folder() -> Path:
    """Where converted models and token streams are kept: `$EVO_HPO_CACHE`, by default `~/.cache/evo_hpo`.

    Raises:
        InvalidSettingError: it is not set, and no home folder is known.
    """
    try:
        return user_path(os.environ.get("EVO_HPO_CACHE") or "~/.cache/evo_hpo")
    except InvalidSettingError as error:
        raise InvalidSettingError(
            f"where the cache goes is not known: set EVO_HPO_CACHE to a folder ({error})"
        ) from None


def made_folder(folder: Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        InvalidSettingError: a file is in the way, or it may not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidSettingError(
            f"cannot make the folder {folder} ({error.strerror}): choose another place"
        ) from error
    return folder


def writable_folder(folder: Path) -> Path:
    """The folder, made where it is missing, in which new files can be made; errors as :func:`made_folder`."""
    if not os.access(made_folder(folder), os.W_OK | os.X_OK):
        raise InvalidSettingError(f"cannot write into the folder {folder}: choose another place")
    return folder


@contextmanager
def place_for(path: str | Path) -> Iterator[Path]:
    """The path, `~` resolved; its folder is made where it is missing, and gone where what follows fails.

    Raises:
        InvalidSettingError: as :func:`user_path` and :func:`writable_folder`.
    """
    place = user_path(path)
    missing = [folder for folder in place.parents if not folder.exists()]
    try:
        writable_folder(place.parent)
        yield place
    except BaseException:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise
