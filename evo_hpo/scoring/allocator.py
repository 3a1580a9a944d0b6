"""Memory that is freed and asked for again a moment later should stay with the process.

Every block frees and allocates the same few tensors of some megabytes. By default the C library of Linux hands such
memory back to the system each time, and page faults then cost up to a tenth of a forward pass.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, see malloc.h
LARGEST_KEPT = 32 << 20
MOST_KEPT = 256 << 20


def keep_freed_memory() -> bool:
    """Makes blocks of up to 32 MiB, 256 MiB in all, be used again; False where the C library has no such setting."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        setting = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(setting(_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(setting(_TRIM_THRESHOLD, MOST_KEPT))
