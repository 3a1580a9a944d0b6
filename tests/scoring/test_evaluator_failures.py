"""Losses that are not finite, memory that runs out, and input that is refused."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
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


class _FailingLevels(RoundedLevels):
    """Once, a level's weights are not given."""

    failing: BaseException | None = None

    def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
        if self.failing is not None and (unit, level) == (3, 1):
            error, self.failing = self.failing, None
            raise error
        return super().weights(unit, level)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("out of memory"), OSError("I/O error"), KeyboardInterrupt()]
)
def test_a_level_that_failed_on_its_way_is_not_taken_for_the_one_before(
    llama: Parts, batch_size: int, failure: BaseException
) -> None:
    model, levels = llama[0], _FailingLevels(llama[0])
    before = (0,) * len(levels.units)
    after = (*before[:3], 1, *before[4:])
    evaluator, held_out = make_evaluator((model, levels), batch_size=batch_size), tiny_tokens(length=LENGTH, seed=3)
    figures = evaluator.evaluate_held_out(before, held_out)
    levels.failing = failure
    if isinstance(failure, torch.OutOfMemoryError):
        found = losses_of(evaluator, [before, after])
        assert found == losses_of(make_evaluator(llama, batch_size=1), [before, after])
        assert evaluator.report()["out_of_memory"] == 1
    else:
        with pytest.raises(type(failure)):
            losses_of(evaluator, [before, after])
        assert evaluator.evaluate_held_out(before, held_out) == figures
        found = losses_of(evaluator, [before, after])
        assert found == losses_of(make_evaluator(llama, batch_size=batch_size), [before, after])


def test_a_level_one_of_whose_weights_does_not_fit_is_not_taken_for_the_one_before(llama: Parts) -> None:
    """A unit of two layers: the first has its new weight when the second one's is refused."""
    model, rounded = llama[0], llama[1]

    class Pairs(RoundedLevels):
        spoilt = False

        def __init__(self) -> None:
            super().__init__(model)
            self.units = [
                Unit("pair", (1, 2, 3), members=tuple(u.name for u in rounded.units[:2])),
            ]

        def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
            first, second = (rounded.weights(u, level) for u in (0, 1))
            if self.spoilt and level == 1:
                return {**first, **{name: torch.zeros(3, 3) for name in second}}
            return {**first, **second}

    levels = Pairs()
    evaluator, held_out = make_evaluator((model, levels)), tiny_tokens(length=LENGTH, seed=3)
    figures = evaluator.evaluate_held_out((0,), held_out)
    levels.spoilt = True
    with pytest.raises(StoreError):
        evaluator.evaluate_held_out((1,), held_out)
    assert evaluator.evaluate_held_out((0,), held_out) == figures


def test_reading_for_another_process_halves_the_passes_too(llama: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, run, seen = random_assignments(3, len(llama[1].units), 3), Replica.run, []

    def greedy(self: Replica, *arguments: Any) -> Any:
        seen.append(len(arguments[2]))
        if len(arguments[2]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 9 bytes")
        return run(self, *arguments)

    evaluator = make_evaluator(llama, batch_size=4)
    expected = [make_evaluator(llama, batch_size=2).read(candidates, [pair])[:, :2] for pair in ([5, 2], [7], [1])]
    monkeypatch.setattr(Replica, "run", greedy)
    np.testing.assert_array_equal(evaluator.read(candidates, [[5, 2, 7], [1]]), np.concatenate(expected, axis=1))
    assert seen == [3, 2, 1, 1]
    seen.clear()
    alone = make_evaluator(
        llama, batch_size=1
    )  # one that would read less at a time by itself takes groups as they come
    assert alone.read(candidates, [[5, 2]]).shape == (3, 2)
    assert seen == [2]


def test_what_a_pass_held_is_free_before_the_next_one(llama: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def greedy(self: Replica, *arguments: Any) -> Any:
        if len(arguments[2]) > 1:
            made = torch.empty(10)
            held.append(weakref.ref(made))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, *arguments)

    def emptied() -> None:
        alive.append(sum(each() is not None for each in held))

    run = Replica.run
    monkeypatch.setattr(Replica, "run", greedy)
    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    for threads in (1, 2):
        evaluator = make_evaluator(llama, threads=threads, batch_size=4)
        evaluator.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
        losses_of(evaluator, random_assignments(3, len(llama[1].units), 3))
    assert alive == [0] * 4
    assert held


def test_a_batch_that_is_tried_again_is_no_minibatch_that_is_used_again(
    llama: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths that are brought back would take more memory than what did not fit."""
    run, brought = Replica.run, []

    def greedy(self: Replica, *arguments: Any) -> Any:
        brought.append(arguments[6])
        if len(arguments[2]) > 1:
            raise MemoryError
        return run(self, *arguments)

    monkeypatch.setattr(Replica, "run", greedy)
    losses_of(make_evaluator(llama, batch_size=4), random_assignments(3, len(llama[1].units), 3))
    assert not any(brought)


def test_where_single_sequences_do_not_fit_nothing_is_kept_between_candidates(
    llama: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates, run = random_assignments(3, len(llama[1].units), 3), Replica.run
    expected = [losses_of(make_evaluator(llama), candidates) for _ in range(2)]

    def greedy(self: Replica, *arguments: Any) -> Any:
        if arguments[4] or arguments[5] or arguments[6] or len(self.switch.packed) or self.switch.packed.limit:
            raise MemoryError
        return run(self, *arguments)

    evaluator = make_evaluator(llama)
    monkeypatch.setattr(Replica, "run", greedy)
    assert [losses_of(evaluator, candidates) for _ in range(2)] == expected
    assert evaluator.report()["out_of_memory"] == 1
    assert all(replica.head.packed.limit == 0 for replica in evaluator.pool.replicas)


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
