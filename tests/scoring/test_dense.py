"""What is kept of the uncompressed model: how much memory, and how little it changes a loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evo_hpo.errors import InvalidSettingError
from evo_hpo.scoring.dense import DenseSide, PackedSide, joined, pack
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.search.problem import Minibatch
from tests.tiny import ARCHITECTURES, RoundedLevels, random_assignments, tiny_model, tiny_tokens

LENGTH = 12
MINIBATCH = Minibatch(5, 7 * LENGTH)


def _vectors(tokens: int = 40, hidden: int = 48, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(tokens, hidden)) * rng.lognormal(0, 3, size=hidden)).float()


def _constants(stored: torch.Tensor) -> torch.Tensor:
    return stored.double().sum(-1) * 1e-3 - 7


def test_packed_vectors_err_by_less_than_a_step_of_their_channel() -> None:
    vectors = _vectors()
    packed = pack(vectors, _constants)
    assert isinstance(packed, PackedSide)
    steps = vectors.abs().amax(0) / 32767 * 1.01
    wide = torch.where(torch.arange(48) < 32, 1.0, 0.5)  # the codes that carry constants are even
    assert bool(((packed.open().vectors - vectors).abs() <= steps * wide).all())


def test_constants_ride_along_in_float32_and_belong_to_what_is_stored() -> None:
    vectors = _vectors(seed=1)
    opened = pack(vectors, _constants).open()
    assert opened.constants is not None
    assert torch.equal(opened.constants, _constants(opened.vectors).float().double())


@pytest.mark.parametrize("value", [0.0, 1e-38, 3e38, -3e38])
def test_channels_of_any_range_survive(value: float) -> None:
    vectors = torch.full((3, 40), value)
    opened = pack(vectors).open()
    torch.testing.assert_close(opened.vectors, vectors, rtol=1e-4, atol=1e-30)


def test_models_too_narrow_for_the_constant_stay_in_float32() -> None:
    vectors = _vectors(hidden=8)
    side = pack(vectors, _constants)
    assert isinstance(side, DenseSide)
    assert torch.equal(side.vectors, vectors)


def test_joined_sides_are_those_of_each_sequence_in_order() -> None:
    sides = [pack(_vectors(seed=s), _constants) for s in (1, 2)]
    both = joined(sides)
    assert torch.equal(both.vectors, torch.cat([s.open().vectors for s in sides]))
    assert both.constants is not None
    assert len(both.constants) == len(both.vectors)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "opt"])  # its head has 24 channels
def test_two_bytes_a_number_change_no_loss_by_more_than_a_hundred_thousandth(name: str) -> None:
    model = tiny_model(name)
    levels = RoundedLevels(model)
    candidates = random_assignments(3, len(levels.units), 3)
    losses = {}
    for bits in (16, 32):
        evaluator = Evaluator(model, levels, tiny_tokens(length=LENGTH), threads=1, dense_bits=bits)
        losses[bits] = [s.loss for s in evaluator.score(candidates, MINIBATCH)]
        if bits == 16:
            assert evaluator.report()["dense_bytes"] == MINIBATCH.tokens * _hidden(evaluator) * 2
    np.testing.assert_allclose(losses[16], losses[32], rtol=1e-5)


def _hidden(evaluator: Evaluator) -> int:
    return int(evaluator.pool.replicas[0].head.weight.shape[1])


def test_the_uncompressed_model_has_no_divergence_from_itself() -> None:
    for name in ("llama", "gemma2"):
        model = tiny_model(name)
        evaluator = Evaluator(model, RoundedLevels(model), tiny_tokens(length=LENGTH), threads=1)
        assert abs(evaluator.evaluate_held_out(None, tiny_tokens(3, seed=9))["loss"]) < 1e-6


def test_other_widths_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InvalidSettingError):
        Evaluator(model, RoundedLevels(model), tiny_tokens(), dense_bits=8)
