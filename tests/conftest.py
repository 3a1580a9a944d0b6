"""A tiny random model and text for it."""

from __future__ import annotations

import pytest
import torch

from evo_hpo.models.loading import LoadedModel
from tests.tiny import tiny_mixtral, tiny_model, tiny_tokens


@pytest.fixture
def llama() -> LoadedModel:
    return LoadedModel.from_model(tiny_model("llama"), name="tiny llama")


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return tiny_tokens(sequences=20, length=16)


def mixtral() -> LoadedModel:
    return LoadedModel.from_model(tiny_mixtral(), name="tiny mixtral")
