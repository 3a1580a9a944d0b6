"""Memory that large passing work has freed goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from evo_hpo.scoring.allocator import give_back_freed_memory, keep_freed_memory


def resident() -> int:
    """Bytes of this process that lie in memory and in no file."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of the C library of Linux")
def test_pages_between_what_is_in_use_are_given_back() -> None:
    if not keep_freed_memory():
        pytest.skip("another C library")
    blocks = [torch.ones(1 << 18) for _ in range(400)]  # 1 MiB each, on the heap
    kept = blocks[::40]
    most = resident()
    del blocks
    assert give_back_freed_memory()
    assert resident() < most - (300 << 20)
    assert float(kept[0].sum()) == 1 << 18
