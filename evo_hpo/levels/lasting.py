"""Memory for decoded weights beside the heap, so that switching levels leaves no holes in it.

glibc finds no room for an aligned block in a hole of just its size: where levels are decoded again and again, the heap
grew to twice what it held. Mappings that are free again are used again, for a new one costs a page fault every 4 kB.
"""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import torch

SMALLEST = 1 << 18
"""Bytes from which on weights get a mapping of their own: a process may have 65530 of them."""

MOST_KEPT = 1 << 28
"""Bytes of free mappings that are kept."""

_free: dict[int, list[mmap.mmap]] = {}


def lasting(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A matrix that nothing is written in yet."""
    size = rows * columns * dtype.itemsize
    if device.type != "cpu" or size < SMALLEST:
        return torch.empty(rows, columns, dtype=dtype, device=device)
    try:
        block = _free.setdefault(size, []).pop()
    except IndexError:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(block, np.uint8)
    weakref.finalize(array, _give_back, block).atexit = False
    return torch.from_numpy(array).view(dtype).view(rows, columns)


def _give_back(block: mmap.mmap) -> None:
    if sum(size * len(blocks) for size, blocks in list(_free.items())) + len(block) <= MOST_KEPT:
        _free[len(block)].append(block)
