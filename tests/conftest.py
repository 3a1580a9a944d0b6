"""A tiny random model and text for it; one thread a process, so that tests in several processes share the cores."""

from __future__ import annotations

import os

import pytest
import torch

from evo_hpo.models.loading import LoadedModel
from tests.tiny import tiny_mixtral, tiny_model, tiny_tokens

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, and of pytest's own workers
torch.set_num_threads(1)


@pytest.fixture
def llama() -> LoadedModel:
    return LoadedModel.from_model(tiny_model("llama"), name="tiny llama")


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return tiny_tokens(sequences=20, length=16)


def mixtral() -> LoadedModel:
    return LoadedModel.from_model(tiny_mixtral(), name="tiny mixtral")
