"""Non-finite weights, inputs and results: refused by the layer's name with every method, never stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evo_hpo.errors import ModelError
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.compressor import Compressor
from evo_hpo.levels.factor import factorise
from evo_hpo.levels.packing import PackedSparse
from evo_hpo.levels.pruners import Magnitude, SparseGPT, Wanda
from evo_hpo.levels.quantizers import GPTQ, RTN
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import LoadedModel
from tests.tiny import tiny_model

LAYER = "model.layers.1.mlp.up_proj"
METHODS = [GPTQ([2, 3], group_size=16), RTN([3], group_size=16), SparseGPT([0.5]), Magnitude([0.5]), Wanda([0.5])]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("compressor", METHODS, ids=lambda c: c.name)
def test_a_weight_that_is_not_finite_is_refused_by_name(
    compressor: Compressor, value: float, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model: Any = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(ModelError, match=f"'{LAYER}.weight' holds values that are not finite") as caught:
        build_store(LoadedModel.from_model(model), tmp_path, compressor, tokens, inputs="dense")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("compressor", [m for m in METHODS if m.needs != "nothing"], ids=lambda c: c.name)
def test_activations_that_overflow_are_refused_by_layer(
    compressor: Compressor, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model: Any = tiny_model("llama").half()
    model.model.layers[1].post_attention_layernorm.weight.data.fill_(60000.0)
    with pytest.raises(ModelError, match=r"inputs of 'model\.layers\.1\.mlp\.\w+' are not finite .* dtype=float32"):
        build_store(LoadedModel.from_model(model), tmp_path, compressor, tokens, inputs="dense")


@pytest.mark.parametrize(
    "hessian",
    [
        torch.full((2, 2), float("nan")),
        torch.tensor([[1.0, float("inf")], [float("inf"), 1.0]]),
        torch.tensor([[1.0, 1e30], [1e30, 1.0]]),
    ],
)
@pytest.mark.timeout(20)
def test_no_factorisation_goes_on_for_ever(hessian: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="H "):
        factorise(hessian)


@pytest.mark.parametrize("scale", [1e6, 1.0, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_values_keep_their_size_in_any_dtype(scale: float, dtype: torch.dtype) -> None:
    weight = scale * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    packed = PackedSparse.from_dense(weight, torch.ones_like(weight).bool(), dtype)
    torch.testing.assert_close(packed.decode(), weight, rtol=1e-2, atol=0)
    assert packed.values.dtype == (torch.float32 if dtype == torch.float16 and scale != 1.0 else dtype)


def test_one_value_beyond_half_precision_is_stored(tokens: torch.Tensor, tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e5
    build_store(LoadedModel.from_model(model), tmp_path, Magnitude([0.5]))
    store = open_store(tmp_path)
    number = [unit.name for unit in store.units].index(LAYER)
    weight = store.weights(number, 0)[LAYER]
    assert weight is not None
    assert float(weight[3, 4]) == 1e5
