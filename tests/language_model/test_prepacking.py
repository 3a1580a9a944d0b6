"""Packed weights: the product is that of the weight in place, whatever was packed before at its address."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional

from evo_hpo.language_model import prepacking
from evo_hpo.language_model.prepacking import Prepacked, PrepackedLinear, linear, use_prepacked

pytestmark = pytest.mark.skipif(
    not torch.backends.mkl.is_available(),  # type: ignore[no-untyped-call]
    reason="weights are packed by MKL",
)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [None, _random(24, seed=3)])
@pytest.mark.parametrize("shape", [(10, 16), (2, 5, 16)])
def test_the_product_is_the_same_packed_or_not(bias: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    x, weight, packed = _random(*shape), _random(24, 16, seed=1), Prepacked(1 << 20)
    packed.expect(10)
    with torch.inference_mode():
        packed.keep("layer", weight)
        assert len(prepacking._packed) == len(packed) == 1
        torch.testing.assert_close(linear(x, weight, bias), functional.linear(x, weight, bias), rtol=1e-6, atol=1e-6)
        turned = _random(16, 10).t()  # not contiguous
        torch.testing.assert_close(linear(turned, weight), functional.linear(turned, weight), rtol=1e-6, atol=1e-6)
        other = _random(7, 16)  # other rows: not packed for them
        torch.testing.assert_close(linear(other, weight, bias), functional.linear(other, weight, bias))


def test_an_address_is_forgotten_with_the_weight() -> None:
    packed, x = Prepacked(1 << 20), _random(10, 16)
    packed.expect(10)
    for seed in range(50):  # memory of one weight is soon that of another
        with torch.inference_mode():
            weight = _random(24, 16, seed=seed)
            torch.testing.assert_close(linear(x, weight), functional.linear(x, weight), rtol=1e-6, atol=1e-6)
            packed.keep("layer", weight)
            torch.testing.assert_close(linear(x, weight), functional.linear(x, weight), rtol=1e-6, atol=1e-6)
    packed.clear()
    del weight
    gc.collect()
    assert not prepacking._packed


def test_replicas_share_packed_weights_and_the_limit_holds() -> None:
    weights = [_random(24, 16, seed=i) for i in range(3)]
    first, second = Prepacked(2 * weights[0].nbytes), Prepacked(1 << 20)
    with torch.inference_mode():
        for packed in (first, second):
            packed.expect(10)
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
