"""A float32 model whose products are taken in bfloat16: against one whose products are rounded from float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PhiConfig, Qwen2MoeConfig

from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.levels.build import build
from evo_hpo.levels.store import LevelStore
from evo_hpo.models.experts import unfuse_experts
from evo_hpo.models.gates import GatedModel
from evo_hpo.models.mixed import MixedEmbedding, MixedLinear, mix
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.placement import Placement
from evo_hpo.scoring.sensitivities import SensitivityPass
from evo_hpo.scoring.task import LanguageModelTask
from evo_hpo.search.problem import Minibatch
from tests.scoring.evaluators import LENGTH, losses_of, make_evaluator
from tests.tiny import (
    VOCABULARY,
    RoundedLevels,
    plain_losses,
    random_assignments,
    random_model,
    save_tiny,
    tiny_mixtral,
    tiny_model,
    tiny_tokens,
)

MINIBATCH = Minibatch(seed=5, tokens=8 * LENGTH)


NAMES = ("llama", "qwen2", "qwen3", "opt", "gpt_neox", "granite", "cohere")


def _tiny(name: str) -> nn.Module:
    if name == "phi":  # its head has a bias
        config = PhiConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
        model: Any = random_model(config, spread=0.25)
        model.lm_head.bias.data.normal_(generator=torch.Generator().manual_seed(0))
        return model  # type: ignore[no-any-return]
    return tiny_mixtral() if name == "mixtral" else tiny_model(name)


class _Exact(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.float(), self.bias)


class _Rounded(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        product = input.bfloat16().double() @ self.weight.double().T
        found = product.bfloat16().float()
        return found if self.bias is None else found + self.bias


def _mixed(make: Callable[[], nn.Module]) -> nn.Module:
    model = make()
    mix(model)
    return model


def _plain(make: Callable[[], nn.Module], kind: type[nn.Linear]) -> nn.Module:
    """With matrices rounded, and multiplied as the class does."""
    model = make()
    with torch.no_grad():
        for module in model.modules():
            if type(module) in (nn.Linear, nn.Embedding):
                module.get_parameter("weight").copy_(module.get_parameter("weight").bfloat16())
            if type(module) is nn.Linear:
                module.__class__ = kind
    return model


@pytest.mark.parametrize("fitness", ["kl", "perplexity"])
@pytest.mark.parametrize("name", [*NAMES, "mixtral", "phi"])
def test_losses_are_those_of_products_rounded_once(name: str, fitness: str) -> None:
    make = partial(_tiny, name)
    model, tokens = _mixed(make), tiny_tokens(length=LENGTH)
    levels = RoundedLevels(model)
    candidates = random_assignments(4, len(levels.units), 3)
    evaluator = make_evaluator((model, levels), fitness=fitness)
    found = [s.loss for s in evaluator.score(candidates, MINIBATCH)]

    def losses(kind: type[nn.Linear]) -> list[float]:
        both = (plain_losses(lambda: _plain(make, kind), levels, c, tokens) for c in candidates)
        return [float(each[fitness != "kl"].double().mean()) for each in both]

    expected, exact = losses(_Rounded), losses(_Exact)
    np.testing.assert_allclose(found, expected, rtol=4e-3)
    assert np.abs(np.array(found) - expected).max() < np.abs(np.array(found) - exact).max()
    assert evaluator.identity["dtype"] == evaluator.report()["dtype"] == "mixed"


def test_only_matrices_are_rounded() -> None:
    model = _mixed(lambda: tiny_model("qwen2"))
    kinds = {str(p.dtype) for m in model.modules() if isinstance(m, nn.Linear) for p in [m.weight]}
    assert kinds == {"torch.bfloat16"}
    others = [p for m in model.modules() if not isinstance(m, nn.Linear | nn.Embedding) for p in m.parameters(False)]
    biases = [m.bias for m in model.modules() if isinstance(m, MixedLinear) and m.bias is not None]
    assert biases
    assert all(p.dtype == torch.float32 for p in (*others, *biases))
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(table, MixedEmbedding)
    assert table.weight is head.weight  # tied as before
    assert table(torch.ones(1, 1, dtype=torch.int64)).dtype == torch.float32


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "Conv1D"), ("gemma2", "Gemma2TextScaledWordEmbedding")])
def test_a_matrix_that_does_more_than_multiply_is_refused(name: str, kind: str) -> None:
    with pytest.raises(ModelError, match=f"is a {kind}, .*use dtype 'bfloat16' or 'float32'"):
        mix(tiny_model(name))


def test_routers_stay_in_float32() -> None:
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
    )
    model = random_model(config)
    unfuse_experts(model)
    mix(model)
    kinds = {n.split(".")[-1]: m for n, m in model.named_modules() if getattr(m, "weight", None) is not None}
    for name in ("gate", "shared_expert_gate"):
        assert kinds[name].get_parameter("weight").dtype == torch.float32
    assert kinds["up_proj"].get_parameter("weight").dtype == torch.bfloat16
    assert len(GatedModel(model, tiny_tokens(1, 12))) == 2


def test_a_name_that_is_no_dtype_is_refused_with_those_that_are() -> None:
    with pytest.raises(InvalidSettingError, match="'Mixed' must be one of auto, float32, bfloat16, float16, mixed"):
        LanguageModelTask("any", dtype="Mixed")


@pytest.mark.parametrize("kind", ["sampled", "kl"])
def test_sensitivities_of_a_head_with_a_bias(kind: Any) -> None:
    mixed, plain = _mixed(partial(_tiny, "phi")), _tiny("phi")
    at = random_assignments(1, len(RoundedLevels(mixed).units), 3)[0] if kind == "kl" else None
    found, expected = (
        SensitivityPass(m, RoundedLevels(m), tiny_tokens()).measure(at, MINIBATCH, kind).effects()
        for m in (mixed, plain)
    )
    assert 0 < np.linalg.norm(found - expected) < 0.3 * np.linalg.norm(expected)


def test_sensitivities_err_less_than_those_of_a_bfloat16_model() -> None:
    def measured(model: nn.Module, levels: RoundedLevels) -> Any:
        return SensitivityPass(model, levels, tiny_tokens()).measure(None, MINIBATCH, "true").projections

    mixed, half = _mixed(lambda: tiny_model("llama")), tiny_model("llama").bfloat16()
    exact = measured(tiny_model("llama"), RoundedLevels(mixed))
    error, other = (np.linalg.norm(measured(m, RoundedLevels(m)) - exact) for m in (mixed, half))
    assert 0 < error < other < 0.5 * np.linalg.norm(exact)


def test_a_store_serves_it_resident_packed_and_streamed(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", spread=0.25)
    build(str(tmp_path / "model"), tmp_path / "store", method="rtn", levels=[2, 3, 8], group_size=16)

    def losses(memory: Any, **settings: Any) -> list[float]:
        loaded = Placement("cpu", (), memory).load(str(tmp_path / "model"), "mixed")
        levels = LevelStore.open(tmp_path / "store", torch.bfloat16, memory).levels
        evaluator = Evaluator(loaded.model, levels, tiny_tokens(length=LENGTH), threads=1, **settings)
        return losses_of(evaluator, random_assignments(6, len(levels.units), 3))

    assert losses("streamed", stream=True) == losses("packed") == losses("resident", packed_bytes=0)
