"""Small random models of several architectures, and text for them."""

from __future__ import annotations

import pytest
import torch
import transformers

from evo_hpo.language_model.loading import LoadedModel
from tests.language_model.tiny import tiny_model, tiny_tokens


@pytest.fixture
def llama() -> LoadedModel:
    return LoadedModel.from_model(tiny_model("llama"), name="tiny llama")


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return tiny_tokens(sequences=20, length=16)


def mixtral() -> LoadedModel:
    """A mixture of experts whose experts transformers stores as one parameter."""
    config = transformers.MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        return LoadedModel.from_model(transformers.MixtralForCausalLM(config), name="tiny mixtral")
    finally:
        torch.random.set_rng_state(state)
