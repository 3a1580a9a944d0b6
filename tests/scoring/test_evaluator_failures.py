"""Losses that are not finite, memory that runs out, and input that is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evo_hpo.errors import InvalidSettingError, ModelError, StoreError
from evo_hpo.models.gates import GatedModel
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.replica import Replica
from evo_hpo.search.problem import Minibatch
from evo_hpo.space.compression_space import Unit
from tests.scoring.evaluators import LENGTH, SMALL, Parts, losses_of, make_evaluator
from tests.tiny import RoundedLevels, random_assignments, tiny_model, tiny_tokens


class _BrokenLevels(RoundedLevels):
    """Level 0 of the first block's last linear layer is not a number."""

    def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
        weights = super().weights(unit, level)
        return {n: w * math.nan for n, w in weights.items() if w is not None} if (unit, level) == (6, 0) else weights


def test_a_loss_that_is_not_finite_is_the_worst_and_counted(llama: Parts) -> None:
    model, levels = llama
    units = len(levels.units)
    for keep in (None, 1):
        evaluator = Evaluator(model, _BrokenLevels(model), tiny_tokens(length=LENGTH), threads=1)
        bad, good = evaluator.score([(0,) * units, (2,) * units], SMALL, keep=keep)
        assert bad.loss == math.inf
        assert bad.reason == "the loss is not finite"
        assert math.isfinite(good.loss)
        assert evaluator.report()["non_finite"] == 1


def test_running_out_of_memory_halves_the_batch(
    llama: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    candidates = random_assignments(3, len(llama[1].units), 3)
    evaluator, run = make_evaluator(llama, batch_size=4), Replica.run

    def greedy(self: Replica, *arguments: Any) -> Any:
        if len(arguments[2]) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return run(self, *arguments)

    held_out = tiny_tokens(length=LENGTH, seed=3)
    before = evaluator.evaluate_held_out(candidates[0], held_out)
    monkeypatch.setattr(Replica, "run", greedy)
    assert losses_of(evaluator, candidates) == losses_of(make_evaluator(llama, batch_size=1), candidates)
    assert evaluator.evaluate_held_out(candidates[0], held_out)["losses"] == pytest.approx(before["losses"], rel=1e-4)
    assert evaluator.report()["batch_size"] == 1
    assert evaluator.report()["out_of_memory"] == 2
    assert caplog.messages == [f"out of memory: going on with {size} sequences a batch" for size in (2, 1)]


def test_held_out_text_too_is_read_in_smaller_batches(llama: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    assignment, held_out = random_assignments(1, len(llama[1].units), 3)[0], tiny_tokens(length=LENGTH, seed=3)
    evaluator, both = make_evaluator(llama, batch_size=4), Replica.both

    def greedy(self: Replica, *arguments: Any) -> Any:
        if len(arguments[1]) > 2:
            raise MemoryError
        return both(self, *arguments)

    monkeypatch.setattr(Replica, "both", greedy)
    found = evaluator.evaluate_held_out(assignment, held_out)
    assert evaluator.report()["batch_size"] == 2
    assert found == make_evaluator(llama, batch_size=2).evaluate_held_out(assignment, held_out)


def test_memory_that_never_suffices_is_an_error(llama: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Replica, "run", greedy)
    with pytest.raises(MemoryError):
        losses_of(make_evaluator(llama), random_assignments(1, len(llama[1].units), 3))


class _Crossed(nn.Module):
    """Its third block also sees the first one's output."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(50, 8, _weight=torch.randn(50, 8, generator=generator))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 50)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        first = self.blocks[0](self.embedding(input_ids))
        logits: Tensor = self.head(self.blocks[2](self.blocks[1](first) + first))
        return logits


def test_a_model_whose_blocks_exchange_more_than_one_state_is_refused() -> None:
    with pytest.raises(ModelError, match="exchange more than one hidden state"):
        GatedModel(_Crossed(), torch.arange(8)[None])


@pytest.mark.parametrize("tokens", [0, LENGTH - 1, LENGTH + 1, 9 * LENGTH])
def test_a_minibatch_that_cannot_be_drawn_is_an_error(llama: Parts, tokens: int) -> None:
    with pytest.raises(InvalidSettingError):
        make_evaluator(llama).score([], Minibatch(0, tokens))


@pytest.mark.parametrize(
    "settings", [{"fitness": "mse"}, {"batch_size": 0}, {"threads": 0}, {"calibration_tokens": torch.zeros(3)}]
)
def test_settings_outside_their_range_are_errors(llama: Parts, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingError):
        Evaluator(*llama, **{"calibration_tokens": tiny_tokens(), **settings})


class _ForeignLevels(RoundedLevels):
    def __init__(self, model: nn.Module, unit: Unit) -> None:
        super().__init__(model)
        self.units = [unit, *self.units[1:]]

    def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
        return {name: torch.zeros(3, 3) for name in self.units[unit].members}


@pytest.mark.parametrize("name", ["no.such.module", "lm_head", "model.layers.0.mlp.up_proj"])
def test_levels_of_another_model_are_refused(name: str) -> None:
    model = tiny_model("llama")
    levels = _ForeignLevels(model, Unit(name, (1, 2, 3)))
    with pytest.raises(StoreError):
        Evaluator(model, levels, tiny_tokens(), threads=1).score([(0,) * len(levels.units)], SMALL)
