"""Mixtures of experts: every layout is taken apart without a change of the output, or refused by name."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from benchmarks.measurements.tiny_architectures import tiny_architecture
from evo_hpo.cli.options import parse_settings
from evo_hpo.errors import ModelError
from evo_hpo.levels.blockwise import build_store, exclude_also, toml_text
from evo_hpo.levels.quantizers import GPTQ, RTN
from evo_hpo.levels.store import open_store
from evo_hpo.models.experts import fuse_experts, fused_leftovers, unfuse_experts
from evo_hpo.models.loading import LoadedModel
from evo_hpo.models.mixed import mix
from evo_hpo.models.structure import ROUTERS, linear_modules

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGURATIONS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "mixtral": lambda: transformers.MixtralConfig(**_COMMON, num_local_experts=3),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_COMMON, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**_COMMON, num_local_experts=3),
    "phimoe": lambda: transformers.PhimoeConfig(**_COMMON, num_local_experts=3),
    "gpt_oss": lambda: transformers.GptOssConfig(**_COMMON, num_local_experts=3, num_experts_per_tok=2, head_dim=8),
}


def make(name: str) -> Any:
    """A model whose parameters, biases included, are all random."""
    auto: Any = transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = auto.from_config(CONFIGURATIONS[name]())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
    return model.requires_grad_(False).eval()


@torch.inference_mode()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens).logits
    return found


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_taken_apart_and_put_together_they_compute_the_same(name: str, tokens: torch.Tensor) -> None:
    model = make(name)
    expected, state = logits(model, tokens), {k: v.clone() for k, v in model.state_dict().items()}
    assert unfuse_experts(model) == 2
    assert not fused_leftovers(model)
    assert sum("experts." in n for n in linear_modules(model)) == 2 * 3 * 3
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-5)
    assert fuse_experts(model) == 2
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "routers"),
    [
        ("dbrx", r"\.ffn\.router\.layer$"),
        ("hunyuan_v1_moe", r"\.mlp\.gate\.wg$"),
        ("jetmoe", r"(mlp|experts)\.router\.layer$"),
        ("longcat_flash", r"\.router\.classifier$"),
        ("afmoe", r"\.mlp\.router\.gate$"),
    ],
)
def test_routers_stay_as_they_are_whatever_they_are_made_of(architecture: str, routers: str) -> None:
    model = tiny_architecture(architecture)
    unfuse_experts(model)
    everything = linear_modules(model, exclude="")
    assert any(re.search(routers, name) for name in everything)
    assert list(linear_modules(model)) == [name for name in everything if not re.search(routers, name)]
    mix(model)
    assert all((m.weight.dtype == torch.float32) == bool(re.search(routers, n)) for n, m in everything.items())


@pytest.mark.parametrize("name", ["mlp.gate_proj", "altup.modality_router", "forget_gate.f_proj", "gate.up_proj"])
def test_layers_that_are_only_called_alike_are_no_routers(name: str) -> None:
    assert not re.search(ROUTERS, f"model.layers.0.{name}")
    assert re.search(ROUTERS, "model.layers.0.mlp.router_gate")  # Doge's


@pytest.mark.parametrize("name", ["gpt_oss", "qwen2_moe"])
def test_experts_with_biases_are_compressed_like_any_layer(name: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    loaded = LoadedModel.from_model(make(name))
    dense = logits(loaded.model, tokens)
    build_store(loaded, tmp_path, GPTQ([2, 8], group_size=16), tokens, inputs="dense")
    store = open_store(tmp_path)
    assert sum(".experts." in unit.name for unit in store.units) == 2 * 3 * 3
    errors = []
    for level in (1, 0):
        for number, unit in enumerate(store.units):
            weight = store.weights(number, level)[unit.name]
            assert weight is not None
            loaded.model.get_submodule(unit.name).weight.data = weight
        errors.append(float((logits(loaded.model, tokens) - dense).square().mean() / dense.square().mean()))
    assert errors[0] < 0.01 < errors[1]


class Odd(nn.Module):
    """Experts in a layout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.zeros(3, 4, 5))


def test_a_layout_that_is_not_known_is_refused_by_name_and_can_be_left_out(llama: LoadedModel, tmp_path: Path) -> None:
    model: Any = llama.model
    model.model.layers[1].mlp.odd = Odd()
    model.model.layers[2].mlp.odd = Odd()
    model.model.layers[2].mlp.kernels = nn.Linear(32, 32, bias=False)  # no such weight, though its name ends alike
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.odd\.kernels.*exclude=") as caught:
        build_store(llama, tmp_path, RTN([3]))
    message = str(caught.value)
    in_a_plan = tomllib.loads(message[message.index("exclude = ") : message.index(" under build")])["exclude"]
    words = shlex.split(message[message.index("--set ") :])
    assert parse_settings(words[1:]) == {"exclude": in_a_plan}
    build_store(llama, tmp_path, RTN([3]), exclude=in_a_plan)
    assert len(open_store(tmp_path).units) == 22


@pytest.mark.parametrize("exclude", [ROUTERS, "", r"\bup_proj$", "it's"])
def test_a_printed_exclude_keeps_what_was_left_out_and_means_the_same_wherever_it_is_pasted(exclude: str) -> None:
    wanted = exclude_also(["model.layers.3.mlp.experts.down_proj", "model.layers.7.mlp.experts.down_proj"], exclude)
    assert tomllib.loads(f"exclude = {toml_text(wanted)}")["exclude"] == wanted
    assert parse_settings(shlex.split(shlex.quote(f"exclude={wanted}"))) == {"exclude": wanted}
    assert re.search(wanted, "model.layers.11.mlp.experts.down_proj")
    assert not re.search(wanted, "model.layers.0.mlp.down_proj")  # the dense layer of the first block
    assert bool(re.search(wanted, "model.layers.3.mlp.gate")) == (exclude == ROUTERS)  # the router stays left out


def test_a_saved_mixture_loads_again(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = make("mixtral")
    expected = logits(model, tokens)
    unfuse_experts(model)
    fuse_experts(model)
    model.save_pretrained(tmp_path)
    auto: Any = transformers.AutoModelForCausalLM
    torch.testing.assert_close(logits(auto.from_pretrained(tmp_path).eval(), tokens), expected, rtol=1e-4, atol=1e-5)
