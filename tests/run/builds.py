"""Builds that stand for :func:`prepare_problem` in processes of their own; apart, as they import this and no more."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evo_hpo.errors import StoreError


def seen(path: Path) -> None:
    """Waits until there is a file that another process makes."""
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.01)


def meeting(_: str, settings: dict[str, Any], progress: Callable[..., None]) -> None:
    """The first two builds are under way at the same time, or both fail."""
    units = settings["units"]
    Path(f"{units}.begun").touch()
    if units < 10:
        seen(Path(f"{17 - units}.begun"))
    progress(1, 1, f"layer of {os.getpid()}")
    with open("built", "a") as built:
        built.write(f"{units}\n")


def failing(_: str, settings: dict[str, Any], progress: Callable[..., None]) -> None:
    """The first ends as its file says, once the other is under way, which would never end."""
    if settings["units"] == 9:
        while True:
            progress(0, 1, "layer")
            time.sleep(0.01)
            Path("alive").touch()
    seen(Path("alive"))
    if (how := Path("how").read_text()) == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "strange":
        raise Strange("neither", "pickled")
    raise StoreError(how) if how == "no room" else RuntimeError(how)


class Strange(Exception):
    """Pickled as it is, it cannot be unpickled."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")
