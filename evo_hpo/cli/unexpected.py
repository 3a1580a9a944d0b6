"""What is said of an error that nobody expected: one line, where its trace is, and what is safe on disk."""

from __future__ import annotations

import contextlib
import tempfile
import traceback
from collections.abc import Iterator

from evo_hpo.errors import EvoHpoError

LONGEST = 300
"""Characters of an error's own text in the line; the trace has all of it."""


@contextlib.contextmanager
def safe(what: str, *also: type[BaseException]) -> Iterator[None]:
    """Notes on an error that nobody expected, or one of those given, what is safe on disk and how to go on."""
    expected: tuple[type[BaseException], ...] = (Exception, *also)
    try:
        yield
    except EvoHpoError:
        raise
    except expected as error:
        error.add_note(what)
        raise


def unexpected(error: Exception) -> str:
    """The line; notes on the error, or else what is true of every command, say what is safe on disk."""
    notes = getattr(error, "__notes__", ["journals and level stores that were on disk are as they were"])
    text = f"unexpected {type(error).__name__}: {error}"
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return "; ".join([text, f"the trace is in {_kept_trace(error)}", *notes])


def _kept_trace(error: Exception) -> str:
    """The file that the trace was written to."""
    try:
        number, path = tempfile.mkstemp(prefix="evo-hpo-", suffix=".log")
        with open(number, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(traceback.format_exception(error))
    except OSError as reason:
        return f"no file ({reason.strerror})"
    return path
