"""Standard output and error as they may be found: closed, ASCII only, a pipe that nobody reads any more, a full disk.

What is shown is never worth the work that it tells of: where it cannot be written, the command goes on in silence.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

from rich.console import Console


class LastingConsole(Console):
    """A console that falls silent where its stream cannot be written any more, instead of ending the command."""

    def print(self, *objects: Any, **settings: Any) -> None:
        """As rich prints it."""
        try:
            super().print(*objects, **settings)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Sends all that follows, what is still buffered included, nowhere."""
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())
            os.close(nowhere)


def usable_streams() -> None:
    """Opens standard streams that are closed onto nothing, and shows what an encoding lacks as question marks."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(number)
            except OSError:  # or else the next file that is opened would get what is printed
                nowhere = os.open(os.devnull, os.O_RDWR)
                if nowhere != number:
                    os.dup2(nowhere, number)
                    os.close(nowhere)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and mode == "w":
            stream.reconfigure(errors="replace")
