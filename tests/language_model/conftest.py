"""A tiny Llama for the tests of the evaluator."""

from __future__ import annotations

import pytest

from tests.language_model.evaluators import Parts
from tests.language_model.tiny import RoundedLevels, tiny_model


@pytest.fixture(scope="session")
def llama() -> Parts:
    model = tiny_model("llama")
    return model, RoundedLevels(model)
