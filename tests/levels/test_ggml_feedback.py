"""GPTQ's codes on the grids of ggml types."""

from __future__ import annotations

import pytest
import torch

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.compressor import Inputs
from evo_hpo.levels.factor import factorise, output_error
from evo_hpo.levels.ggml import dequantize, quantize
from evo_hpo.levels.ggml_feedback import BITS, with_feedback
from evo_hpo.levels.packing import GgmlBlocks
from evo_hpo.levels.quantizers import Ggml


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", BITS)
def test_feedback_keeps_a_types_scales_and_lowers_the_error_of_outputs(name: str) -> None:
    weight, mixing = random(48, 128), random(600, 128) @ random(128, 128)
    hessian = mixing.T @ mixing
    blocks = quantize(weight, name, hessian.diagonal() / hessian.diagonal().mean())
    found = with_feedback(weight, blocks, name, factorise(hessian, 0.01, False))
    assert torch.equal(*(b.view(48, 4, -1)[..., :2] for b in (found, blocks)))
    before, after = (output_error(weight, dequantize(b, name), hessian) for b in (blocks, found))
    assert after < 0.8 * before
    alone = with_feedback(weight, blocks, name, factorise(torch.eye(128), 0.01, False))
    assert float((dequantize(alone, name) - weight).square().sum()) <= float(
        (dequantize(blocks, name) - weight).square().sum()
    )


@pytest.mark.parametrize("name", BITS)
def test_codes_are_those_of_the_plain_algorithm_with_the_largest_inputs_first(name: str) -> None:
    """Every column to its nearest value, and what is left over moves the columns to come by the inverse of their H."""
    weight, mixing = random(24, 64), random(300, 64) @ random(64, 64) * torch.linspace(0.2, 2, 64)
    hessian = mixing.T @ mixing
    blocks = quantize(weight, name, hessian.diagonal())
    factor = factorise(hessian, 0.01, True)
    found = dequantize(with_feedback(weight, blocks, name, factor), name)
    scales = blocks.view(24, 2, -1)[..., :2].contiguous().view(torch.float16).double()
    values = torch.arange(-(2 ** BITS[name]) // 2, 2 ** BITS[name] // 2) * scales
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)).double()
    left, expected = weight.double(), torch.zeros(24, 64).double()
    order = hessian.diagonal().argsort(descending=True).tolist()
    for place, j in enumerate(order):
        offered = values[:, j // 32]
        expected[:, j] = offered.gather(1, (offered - left[:, j, None]).abs().argmin(1, keepdim=True))[:, 0]
        rest = order[place:]
        inverse = damped[rest][:, rest].inverse()[0]
        left[:, rest] -= ((left[:, j] - expected[:, j]) / inverse[0])[:, None] * inverse
    assert torch.isclose(found.double(), expected, atol=1e-6).double().mean() > 0.999  # else a tie, or what one moved
    standing = dequantize(with_feedback(weight, blocks, name, factorise(hessian, 0.01, False)), name)
    assert output_error(weight, found, hessian) < 0.9 * output_error(weight, standing, hessian)


def test_levels_of_a_store_have_it_where_their_types_can_and_inputs_are_known() -> None:
    """Bytes stay; other types, and matrices of whose inputs only squares are known, are llama.cpp's own."""
    weight, mixing = random(48, 256), random(600, 256) @ random(256, 256)
    hessian = mixing.T @ mixing
    types = [*BITS, "IQ4_NL", "Q4_K", "Q8_0"]
    plain, found = (Ggml(types, feedback=on).compress(weight, Inputs(hessian, 256)) for on in (False, True))
    assert [level.label for level in plain] == [level.label for level in found]
    for own, other in zip(plain, found, strict=True):
        assert isinstance(own.encoded, GgmlBlocks)
        assert isinstance(other.encoded, GgmlBlocks)
        assert own.bits == other.bits
        assert torch.equal(own.encoded.blocks, other.encoded.blocks) == (own.label not in BITS)
        expected = output_error(weight, other.encoded.decode(), hessian)
        assert other.error == pytest.approx(expected, rel=1e-5)
        assert own.label not in BITS or expected < 0.9 * output_error(weight, own.encoded.decode(), hessian)
    known = Inputs(hessian.diagonal(), 256)
    for own, other in zip(*(Ggml(types, feedback=on).compress(weight, known) for on in (False, True)), strict=True):
        assert torch.equal(own.encoded.blocks, other.encoded.blocks)
    assert (Ggml(types).needs, Ggml(types, feedback=True).needs) == ("diagonal", "hessian")
    assert "feedback" not in Ggml(types).settings()
    assert Ggml(types, feedback=True).settings()["feedback"] is True
    with pytest.raises(InvalidSettingError, match="must be true or false"):
        Ggml(types, feedback="yes")  # type: ignore[arg-type]
    with pytest.raises(InvalidSettingError, match="changes Q4_0 and Q5_0 alone, and the types are Q8_0: add one"):
        Ggml(["Q8_0"], feedback=True)
