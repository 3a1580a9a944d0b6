"""Golden values: the published layer against what other people's solvers make of it."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.measurements.compression.golden import BITS, SPARSITIES, layer
from evo_hpo.levels.factor import factorise, output_error
from evo_hpo.levels.gptq import gptq
from evo_hpo.levels.masks import parse_sparsities
from evo_hpo.levels.sparsegpt import sparsegpt

# published_solvers.py --rows 64: llmcompressor 0.14.0.1 (GPTQ: modelopt 0.47.0 agrees)
LLMCOMPRESSOR_GPTQ = (0.04114, 0.007218, 0.00151, 0.000353, 8.681e-05)
LLMCOMPRESSOR_SPARSEGPT = {0.3: 0.002904, 0.5: 0.01751, 0.7: 0.07405}
# measured elsewhere, with three solvers, on a layer of this shape: group 64, asymmetric, static
ELSEWHERE = (0.0421, 0.00707, 0.00152, 0.000354, 0.0000852)


def gptq_errors(weight: torch.Tensor, hessian: torch.Tensor) -> list[float]:
    """Relative output errors of all bit-widths."""
    return [output_error(weight, level.decode(), hessian) for level in gptq(weight, factorise(hessian), BITS)]


def test_gptq_is_as_good_as_published_solvers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gptq_errors(*layer(64)) == pytest.approx(LLMCOMPRESSOR_GPTQ, rel=0.015)
    monkeypatch.setattr("evo_hpo.levels.grid.storable_scale", lambda scale, exponent: scale)
    assert gptq_errors(*layer(64)) == pytest.approx(LLMCOMPRESSOR_GPTQ, rel=0.001)  # they keep single-precision scales


def test_sparsegpt_is_as_good_as_published_solvers() -> None:
    weight, hessian = layer(64)
    levels = parse_sparsities(SPARSITIES)
    for level, (pruned, _) in zip(levels, sparsegpt(weight, factorise(hessian), levels), strict=True):
        expected = LLMCOMPRESSOR_SPARSEGPT[float(level.share)]
        assert output_error(weight, pruned, hessian) == pytest.approx(expected, rel=0.015)


def test_the_whole_layer_repeats_figures_measured_elsewhere() -> None:
    errors = gptq_errors(*layer())
    assert errors == pytest.approx(ELSEWHERE, rel=0.03)
    ratios, theirs = ([a / b for a, b in itertools.pairwise(found)] for found in (errors, ELSEWHERE))
    assert ratios == pytest.approx(theirs, rel=0.02)
