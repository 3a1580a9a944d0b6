"""Memory that is freed and asked for again a moment later should stay with the process.

Every block frees and allocates the same few tensors of some megabytes. By default the C library of Linux hands such
memory back to the system each time, and page faults then cost up to a tenth of a forward pass.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, see malloc.h
LARGEST_KEPT = 32 << 20
MOST_KEPT = 256 << 20


def keep_freed_memory() -> bool:
    """Makes blocks of up to 32 MiB, 256 MiB in all, be used again; False where the C library has no such setting."""
    setting = _of_the_c_library("mallopt")
    return bool(setting and setting(_MMAP_THRESHOLD, LARGEST_KEPT) and setting(_TRIM_THRESHOLD, MOST_KEPT))


def give_back_freed_memory() -> bool:
    """After something rare and large: whole free pages go back to the system, also those between what is in use."""
    trim = _of_the_c_library("malloc_trim")
    return bool(trim and trim(0))


def _of_the_c_library(name: str) -> Any:
    """A function of glibc, or None where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
