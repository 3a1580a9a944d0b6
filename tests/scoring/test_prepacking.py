"""Packed weights: the product is that of the weight in place, whatever was packed before at its address."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from evo_hpo.models.mixed import MixedLinear
from evo_hpo.scoring import prepacking
from evo_hpo.scoring.prepacking import Prepacked, PrepackedLinear, linear, product_by, use_prepacked

pytestmark = pytest.mark.skipif(
    not (prepacking._packs(torch.float32) and prepacking._packs(torch.bfloat16)),
    reason="weights are packed by MKL and oneDNN",
)


ROWS = 40
"""Enough that packing a matrix of 64 inputs changes no bit, so that it is packed."""


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    gc.collect()  # evaluators of other tests may have packed weights
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_is_the_same_packed_or_not(biased: bool, dtype: torch.dtype) -> None:
    weight, bias = _random(96, 64, seed=1).to(dtype), _random(96, seed=3).to(dtype) if biased else None
    packed = Prepacked(1 << 20)
    packed.expect(ROWS)
    with torch.inference_mode():
        packed.keep("layer", weight)
        assert len(prepacking._packed) == len(packed) == 1
        for x in (
            _random(ROWS, 64),
            _random(2, ROWS // 2, 64),
            _random(64, ROWS).t(),  # not contiguous
            _random(2, 64, ROWS // 2).transpose(1, 2),
            _random(7, 64),  # other rows: not packed for them
        ):
            x = x.to(dtype)
            assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))
        with pytest.raises(RuntimeError):
            linear(_random(ROWS, 63).to(dtype), weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [33, 128])
@pytest.mark.parametrize("inputs", [64, 576, 896, 1024, 2048])
def test_no_shape_changes_a_bit(inputs: int, rows: int, dtype: torch.dtype) -> None:
    packed = Prepacked(1 << 30)
    packed.expect(rows)
    with torch.inference_mode():
        for seed in range(4):
            x, weight = _random(rows, inputs, seed=seed).to(dtype), _random(96, inputs, seed=100 + seed).to(dtype)
            packed.keep(str(seed), weight)
            for bias in (None, _random(96, seed=9).to(dtype)):
                assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))
    assert dtype == torch.float32 or inputs > 576 or len(packed) == 4


def test_another_order_of_adding_up_is_found_behind_sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product in two halves rounds to nearly the same 16-bit numbers; it must count as another one all the same."""

    def halves(
        x: torch.Tensor, _: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, __: int
    ) -> torch.Tensor:
        x, weight, half = x.float(), weight.float(), x.shape[-1] // 2
        product = x[:, half:] @ weight[:, half:].T + x[:, :half] @ weight[:, :half].T
        return (product if bias is None else product + bias).bfloat16()

    with torch.inference_mode():
        assert prepacking._same_bits.__wrapped__(96, 64, ROWS, torch.bfloat16)
        monkeypatch.setattr(prepacking, "_multiply", halves)
        for outputs in (16, 96):
            x, weight = _random(ROWS, 64).bfloat16(), _random(outputs, 64, seed=1).bfloat16()
            others = halves(x, x, weight, None, 0) != functional.linear(x, weight)
            assert float(others.float().mean()) < 1e-3  # hardly a number of an ordinary product tells
            assert not prepacking._same_bits.__wrapped__(outputs, 64, ROWS, torch.bfloat16)


def test_inputs_of_another_dtype_are_rounded_and_meet_the_packed_weight() -> None:
    x, weight, bias = _random(ROWS, 64), _random(96, 64, seed=1).bfloat16(), _random(96, seed=2)
    packed = Prepacked(1 << 20)
    packed.expect(ROWS)
    with torch.inference_mode():
        packed.keep("layer", weight)
        assert len(packed) == 1
        found = linear(x, weight, bias)
        assert torch.equal(found, functional.linear(x.bfloat16(), weight).float() + bias)
        exact = x.bfloat16().double() @ weight.double().T + bias
        assert float((found - exact).abs().max()) < 2**-8 * float(exact.abs().max())


def test_a_square_weight_and_its_transpose_are_two() -> None:
    x, weight, packed = _random(40, 64), _random(64, 64, seed=1), Prepacked(1 << 20)
    packed.expect(40)
    with torch.inference_mode():
        packed.keep("layer", weight)
        assert torch.equal(linear(x, weight.t()), functional.linear(x, weight.t()))


def test_an_address_is_forgotten_with_the_weight() -> None:
    packed, x = Prepacked(1 << 20), _random(ROWS, 64)
    packed.expect(ROWS)
    for seed in range(50):  # memory of one weight is soon that of another
        with torch.inference_mode():
            weight = _random(24, 64, seed=seed)
            assert torch.equal(linear(x, weight), functional.linear(x, weight))
            packed.keep("layer", weight)
            assert torch.equal(linear(x, weight), functional.linear(x, weight))
    packed.clear()
    del weight
    gc.collect()
    assert not prepacking._packed


def test_replicas_share_packed_weights_and_the_limit_holds() -> None:
    weights = [_random(24, 64, seed=i) for i in range(3)]
    first, second = Prepacked(2 * weights[0].nbytes), Prepacked(1 << 20)
    with torch.inference_mode():
        for packed in (first, second):
            packed.expect(ROWS)
            for name, weight in enumerate(weights):
                packed.keep(str(name), weight)
    assert len(first) == 2
    assert len(second) == len(prepacking._packed) == 3
    assert second.expect(5)
    assert len(second) == 0
    assert len(prepacking._packed) == 2


def test_only_plain_and_mixed_linear_layers_are_turned() -> None:
    class Own(nn.Linear):
        pass

    layers = [nn.Linear(4, 4, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    others = [MixedLinear(4, 4, dtype=torch.bfloat16), Own(4, 4), nn.LayerNorm(4)]
    assert use_prepacked([*layers, *others]) == {*layers[:2], others[0]}
    expected = [PrepackedLinear, PrepackedLinear, nn.Linear, PrepackedLinear, Own, nn.LayerNorm]
    assert [type(layer) for layer in (*layers, *others)] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(96, 64), (5, 3), (480, 577)])
def test_many_products_by_one_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = _random(*shape, seed=1).to(dtype)
    multiply = product_by(weight)
    for rows in (ROWS, ROWS, 7, 0, 1):
        x = _random(shape[1], rows, seed=rows).to(dtype).T
        assert torch.equal(multiply(x), product_by(weight)(x.contiguous())), "whatever was multiplied before"
        if not rows:
            continue
        expected = x.double() @ weight.double().T
        error = (multiply(x).double() - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float64: 1e-14}[dtype]
