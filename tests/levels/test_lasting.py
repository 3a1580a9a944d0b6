"""Memory of decoded weights: used again once nobody holds it, and by nobody before."""

from __future__ import annotations

import gc

import pytest
import torch

from evo_hpo.levels.lasting import lasting

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_used_again_once_the_last_view_is_gone(dtype: torch.dtype) -> None:
    first = lasting(1024, 513, dtype, CPU)
    address, row = first.data_ptr(), first.fill_(3.0)[7]
    assert address % 64 == 0  # products may take other bits at other alignments
    del first
    gc.collect()
    second = lasting(1024, 513, dtype, CPU).zero_()
    assert second.data_ptr() != address
    assert bool((row == 3.0).all())
    del row
    gc.collect()
    assert lasting(1024, 513, dtype, CPU).data_ptr() == address


def test_small_matrices_lie_on_the_heap_and_large_ones_are_not_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, list[object]] = {}
    monkeypatch.setattr("evo_hpo.levels.lasting._free", kept)
    monkeypatch.setattr("evo_hpo.levels.lasting.MOST_KEPT", 3 << 20)
    lasting(3, 5, torch.float32, CPU)
    assert not kept
    held = [lasting(512, 512, torch.float32, CPU) for _ in range(5)]
    held.clear()
    gc.collect()
    assert {size: len(blocks) for size, blocks in kept.items()} == {1 << 20: 3}
