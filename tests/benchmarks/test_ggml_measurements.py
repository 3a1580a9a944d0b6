"""What the measurements of ggml types compute: GPTQ's codes on a type's own grid."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measurements.compression.ggml_feedback import BITS, with_feedback
from evo_hpo.levels.factor import factorise, output_error
from evo_hpo.levels.ggml import dequantize, quantize


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", BITS)
def test_feedback_keeps_a_types_scales_and_lowers_the_error_of_outputs(name: str) -> None:
    weight, mixing = random(48, 128), random(600, 128) @ random(128, 128)
    hessian = mixing.T @ mixing
    blocks = quantize(weight, name, hessian.diagonal() / hessian.diagonal().mean())
    found = with_feedback(weight, blocks, name, factorise(hessian, 0.01, False))
    head = 4 if name.endswith("1") else 2
    assert torch.equal(*(b.view(48, 4, -1)[..., :head] for b in (found, blocks)))
    before, after = (output_error(weight, dequantize(b, name), hessian) for b in (blocks, found))
    assert after < 0.8 * before
    alone = with_feedback(weight, blocks, name, factorise(torch.eye(128), 0.01, False))
    assert float((dequantize(alone, name) - weight).square().sum()) <= float(
        (dequantize(blocks, name) - weight).square().sum()
    )
