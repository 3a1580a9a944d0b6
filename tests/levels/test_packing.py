"""Packing loses nothing and takes the bytes it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evo_hpo.errors import StoreError
from evo_hpo.levels.grid import GridSettings, fit_grid
from evo_hpo.levels.packing import PackedSparse, decode_record, pack_bits, unpack_bits
from evo_hpo.levels.rtn import round_to_nearest


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(1, 300), seed=st.integers(0, 99))
def test_packing_is_lossless_at_every_width_and_length(bits: int, count: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8))
    packed = pack_bits(codes, bits)
    assert packed.numel() == -(-count // 8) * bits
    assert torch.equal(unpack_bits(packed, bits, count), codes)
    first, last = sorted(np.random.default_rng(seed).integers(0, count + 1, 2).tolist())
    assert torch.equal(unpack_bits(packed, bits, count, first, last), codes[first:last])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("at_a_time", [1, 25, 49, 1000])
def test_weights_decoded_some_rows_at_a_time_are_the_same(
    bits: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = round_to_nearest(torch.randn(7, 24, generator=torch.Generator().manual_seed(bits)), bits)
    monkeypatch.setattr("evo_hpo.levels.packing.AT_A_TIME", at_a_time)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(quantized.pack().decode(dtype), quantized.decode(dtype))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(1, 8),
    group=st.sampled_from([1, 5, 8, 64, None]),
    symmetric=st.booleans(),
    scale=st.sampled_from([1e-9, 1e-3, 1.0, 1e6]),
)
def test_stored_quantized_weights_decode_to_the_solvers_weights(
    bits: int, group: int | None, symmetric: bool, scale: float
) -> None:
    weight = torch.from_numpy(np.random.default_rng(bits).normal(size=(7, 24)) * scale).float()
    quantized = round_to_nearest(weight, bits, GridSettings(group, symmetric))
    packed = quantized.pack()
    again = decode_record(packed.settings(), packed.tensors())
    assert torch.equal(again.decode(), quantized.decode())
    assert again.storage_bits == sum(8 * t.numel() * t.element_size() for t in packed.tensors().values())


def test_storage_is_codes_scales_and_zero_points() -> None:
    packed = round_to_nearest(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), 3).pack()
    assert packed.storage_bits == 64 * 128 * 3 + 64 * 2 * (16 + 8)


def test_sparse_weights_round_trip() -> None:
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.normal(size=(9, 13))).float()
    mask = torch.from_numpy(rng.random((9, 13)) < 0.4)
    packed = PackedSparse.from_dense(weight, mask)
    assert torch.equal(packed.decode(), torch.where(mask, weight.half().float(), 0.0))
    assert packed.storage_bits == 8 * -(-9 * 13 // 8) + 16 * int(mask.sum())


def test_a_group_of_zeros_stays_zero() -> None:
    grid = fit_grid(torch.zeros(8, 3), torch.tensor(7.0), GridSettings(8), 0)
    assert torch.equal(grid.values(grid.codes(torch.zeros(8, 3))), torch.zeros(8, 3))


def test_zero_is_represented_exactly_from_two_bits_up() -> None:
    weight = torch.from_numpy(np.random.default_rng(1).normal(size=(16, 64))).float()
    weight[:, ::3] = 0
    for bits in range(2, 9):
        for symmetric in (False, True):
            assert (round_to_nearest(weight, bits, GridSettings(64, symmetric)).decode()[:, ::3] == 0).all()


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(StoreError, match="damaged"):
        unpack_bits(torch.zeros(5, dtype=torch.uint8), 3, 16)
