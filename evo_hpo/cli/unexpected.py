"""What is said of an error that nobody expected: one line, where its trace is, and what is safe on disk."""

from __future__ import annotations

import tempfile
import traceback

__all__ = ["unexpected"]

LONGEST = 300
"""Characters of an error's own text in the line; the trace has all of it."""


def unexpected(error: Exception) -> str:
    """The line; notes on the error say what is safe on disk and how to go on."""
    text = f"unexpected {type(error).__name__}: {error}"
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return "; ".join([text, f"the trace is in {_kept_trace(error)}", *getattr(error, "__notes__", [])])


def _kept_trace(error: Exception) -> str:
    """The file that the trace was written to."""
    try:
        number, path = tempfile.mkstemp(prefix="evo-hpo-", suffix=".log")
        with open(number, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(traceback.format_exception(error))
    except OSError as reason:
        return f"no file ({reason.strerror})"
    return path
