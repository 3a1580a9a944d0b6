"""How a backward pass runs: graphs, groups and batches of sequences, levels decoded once, what a failure leaves."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from torch.nn import Parameter

from evo_hpo.scoring.sensitivities import SensitivityPass
from evo_hpo.search.problem import Minibatch
from tests.tiny import DropLevels, RoundedLevels, tiny_model, tiny_tokens

MINIBATCH = Minibatch(seed=5, tokens=60)


@pytest.mark.parametrize(
    "settings",
    [{"graph_bytes": 0}, {"graph_bytes": 1 << 17}, {"group": 2}, {"group": 1}, {"batch": 2}, {"batch": 16}],
)
def test_neither_graphs_that_are_made_again_nor_groups_change_a_projection(settings: dict[str, int]) -> None:
    model = tiny_model("llama")
    levels, tokens = RoundedLevels(model), tiny_tokens()
    whole = SensitivityPass(model, levels, tokens).measure(None, MINIBATCH)
    sensitivities = SensitivityPass(model, levels, tokens, **settings)  # type: ignore[arg-type]
    other = sensitivities.measure(None, MINIBATCH)
    if settings.get("graph_bytes"):
        assert 0 < sensitivities._kept_from < 3  # one graph is kept, another is not
    np.testing.assert_allclose(other.projections, whole.projections, rtol=1e-3, atol=1e-5)
    assert whole.squares is not None
    assert other.squares is not None
    np.testing.assert_allclose(other.squares, whole.squares, rtol=1e-3, atol=1e-5)


def test_levels_are_decoded_once_for_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    levels, decoded = RoundedLevels(model), Counter[tuple[int, int]]()
    weights = levels.weights

    def counted(unit: int, level: int) -> Any:
        decoded[unit, level] += 1
        return weights(unit, level)

    sensitivities = SensitivityPass(model, levels, tiny_tokens(), batch=1)
    monkeypatch.setattr(levels, "weights", counted)
    sensitivities.measure(None, MINIBATCH)
    assert decoded == dict.fromkeys(((u, k) for u in range(len(levels.units)) for k in range(3)), 1)


def test_a_pass_that_failed_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out on the way back, when some sequences have been through a block and others have not."""
    model = tiny_model("llama")
    sensitivities = SensitivityPass(model, RoundedLevels(model), tiny_tokens())
    expected = sensitivities.measure(None, MINIBATCH)
    through, calls = sensitivities._through, iter(range(1000))

    def failing(*args: Any) -> Tensor:
        if next(calls) == 2:
            raise MemoryError
        return through(*args)

    monkeypatch.setattr(sensitivities, "_through", failing)
    with pytest.raises(MemoryError):
        sensitivities.measure(None, MINIBATCH)
    found = sensitivities.measure(None, MINIBATCH)
    np.testing.assert_array_equal(found.projections, expected.projections)
    assert sensitivities.measure(None, Minibatch(5, 12)).projections.shape[0] == 1


def test_a_larger_minibatch_begins_with_the_same_projections() -> None:
    model = tiny_model("llama")
    sensitivities = SensitivityPass(model, RoundedLevels(model), tiny_tokens(), group=1)
    small, large = (sensitivities.measure(None, Minibatch(3, 12 * n)) for n in (2, 5))
    np.testing.assert_array_equal(large.projections[:2], small.projections)
    assert sensitivities.measure(None, Minibatch(4, 24)).projections.tolist() != small.projections.tolist()


def test_nothing_of_a_pass_with_modules_dropped_outlives_it() -> None:
    """The norm before a dropped module has a graph that nothing is read back through."""
    model = tiny_model("llama")
    levels = DropLevels(model)
    sensitivities = SensitivityPass(model, levels, tiny_tokens())
    at = (0,) * len(levels.units)

    def alive() -> int:
        sensitivities.measure(at, MINIBATCH, kind="kl")
        gc.collect()
        return sum(type(each) in (Tensor, Parameter) for each in gc.get_objects())

    assert alive() == alive()
