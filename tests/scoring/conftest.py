"""A tiny Llama for the tests of the evaluator."""

from __future__ import annotations

import pytest

from tests.scoring.evaluators import Parts
from tests.tiny import RoundedLevels, tiny_model


@pytest.fixture(scope="session")
def llama() -> Parts:
    model = tiny_model("llama")
    return model, RoundedLevels(model)
