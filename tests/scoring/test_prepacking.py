"""Packed weights: the product is that of the weight in place, whatever was packed before at its address."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from evo_hpo.scoring import prepacking
from evo_hpo.scoring.prepacking import Prepacked, PrepackedLinear, linear, use_prepacked

pytestmark = pytest.mark.skipif(
    not torch.backends.mkl.is_available(),  # type: ignore[no-untyped-call]
    reason="weights are packed by MKL",
)


ROWS = 40
"""Enough that packing a matrix of 64 inputs changes no bit, so that it is packed."""


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [None, _random(24, seed=3)])
@pytest.mark.parametrize("shape", [(10, 16), (2, 5, 16)])
def test_the_product_is_the_same_packed_or_not(bias: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    x, weight, packed = _random(*shape), _random(24, 16, seed=1), Prepacked(1 << 20)
    packed.expect(10)
    with torch.inference_mode():
        packed.keep("layer", weight)
        assert len(prepacking._packed) == len(packed)
        assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))
        turned = _random(16, 10).t()  # not contiguous
        assert torch.equal(linear(turned, weight, bias), functional.linear(turned, weight, bias))
        other = _random(7, 16)  # other rows: not packed for them
        assert torch.equal(linear(other, weight, bias), functional.linear(other, weight, bias))
        with pytest.raises(RuntimeError):
            linear(_random(10, 15), weight, bias)


@pytest.mark.parametrize("rows", [33, 128])
@pytest.mark.parametrize("inputs", [64, 576, 896, 1024, 2048])
def test_no_shape_changes_a_bit(inputs: int, rows: int) -> None:
    packed = Prepacked(1 << 30)
    packed.expect(rows)
    with torch.inference_mode():
        for seed in range(4):
            x, weight = _random(rows, inputs, seed=seed), _random(96, inputs, seed=100 + seed)
            packed.keep(str(seed), weight)
            assert torch.equal(linear(x, weight), functional.linear(x, weight))


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


def test_only_plain_linear_layers_of_32_bits_are_turned() -> None:
    class Own(nn.Linear):
        pass

    layers = [nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16), nn.LayerNorm(4)]
    assert use_prepacked(layers) == {layers[0]}
    assert [type(layer) for layer in layers] == [PrepackedLinear, Own, nn.Linear, nn.LayerNorm]
