"""A tiny Llama for the tests of the evaluator, and what a sensitivity pass takes together."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor

from evo_hpo.scoring.layers_together import LayersTogether
from tests.scoring.evaluators import Parts
from tests.tiny import RoundedLevels, tiny_model


@pytest.fixture(scope="session")
def llama() -> Parts:
    model = tiny_model("llama")
    return model, RoundedLevels(model)


@pytest.fixture
def taken_together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects how many layers a pass takes together, each time that it does."""
    counts: list[int] = []
    take = LayersTogether.take

    def counted(together: LayersTogether) -> Iterator[tuple[list[int], Tensor]]:
        for units, sums in take(together):
            counts.append(len(units))
            yield units, sums

    monkeypatch.setattr(LayersTogether, "take", counted)
    return counts
