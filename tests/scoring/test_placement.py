"""Models spread over devices, and models whose blocks are brought to one: the same bits, everything in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.levels.build import build
from evo_hpo.levels.store import LevelStore
from evo_hpo.models.gates import replicate
from evo_hpo.models.loading import load_model
from evo_hpo.models.placing import Stages, beside_blocks
from evo_hpo.models.streaming import BlockStream
from evo_hpo.models.structure import decoder_blocks
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.placement import Placement
from evo_hpo.scoring.sensitivities import SensitivityPass
from evo_hpo.scoring.task import LanguageModelTask
from evo_hpo.search.problem import Minibatch
from tests.levels.accelerator import StandIn, on_accelerator
from tests.scoring.evaluators import LARGE, LENGTH, losses_of, make_evaluator
from tests.tiny import DropLevels, RoundedLevels, random_assignments, save_tiny, tiny_model, tiny_tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("fitness", ["kl", "perplexity"])
def test_stages_and_streamed_blocks_give_the_losses_of_one_device(name: str, fitness: str) -> None:
    model = tiny_model(name)
    levels = RoundedLevels(model)
    candidates = random_assignments(5, len(levels.units), 3)
    alone = make_evaluator((model, levels), fitness=fitness)
    expected = losses_of(alone, candidates)
    streamed = make_evaluator((model, levels), fitness=fitness, stream=True, threads=2)
    assert losses_of(streamed, candidates) == expected
    text = tiny_tokens(3, LENGTH, seed=1)
    assert streamed.evaluate_held_out(candidates[0], text) == alone.evaluate_held_out(candidates[0], text)
    spread = copy.deepcopy(model)
    Stages.spread(spread, ["cpu", "cpu"])
    assert losses_of(make_evaluator((spread, levels), fitness=fitness), candidates) == expected


def test_blocks_that_are_dropped_stay_where_they_are() -> None:
    model = tiny_model("llama")
    levels = DropLevels(model, ("block", "attention"))
    candidates = random_assignments(6, len(levels.units), 2)
    expected = losses_of(make_evaluator((model, levels)), candidates)
    assert losses_of(make_evaluator((model, levels), stream=True), candidates) == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a store of 2, 3 and 8 bits."""
    made = tmp_path_factory.mktemp("placed")
    save_tiny(made / "model", spread=0.25)
    build(str(made / "model"), made / "store", method="rtn", levels=[2, 3, 8], group_size=16)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_store_is_decoded_at_its_blocks_turn(folder: Path, dtype: torch.dtype) -> None:
    loaded = load_model(str(folder / "model"), dtype)
    tokens = tiny_tokens(length=LENGTH)

    def losses(memory: Any, **settings: Any) -> list[float]:
        store = LevelStore.open(folder / "store", dtype, memory).levels.with_dropped().tied()
        evaluator = Evaluator(loaded.model, store, tokens, threads=1, **settings)
        return losses_of(evaluator, random_assignments(6, len(store.units), 4))

    assert losses("streamed", stream=True) == losses("resident", packed_bytes=0)


@pytest.mark.parametrize("form", ["inner", "output", "trace"])
def test_sensitivities_are_those_of_one_device(form: Any) -> None:
    model = tiny_model("llama")
    levels, tokens = RoundedLevels(model), tiny_tokens(length=LENGTH)
    assignment = random_assignments(1, len(levels.units), 3)[0]

    def measured(model: nn.Module, stream: torch.device | None) -> Any:
        passed = SensitivityPass(model, levels, tokens, stream=stream, graph_bytes=0, batch=16)
        return passed.measure(assignment, LARGE, "kl", form)

    expected = measured(model, None)
    spread = copy.deepcopy(model)
    Stages.spread(spread, ["cpu", "cpu"])
    for found in (measured(model, torch.device("cpu")), measured(spread, None)):
        assert (found.projections == expected.projections).all()


def test_blocks_come_ahead_of_their_turn_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way back the one before is fetched: each block once a way, all but the first of a way ahead."""
    model = tiny_model("llama")
    passed = SensitivityPass(
        model, RoundedLevels(model), tiny_tokens(length=LENGTH), stream=torch.device("cpu"), graph_bytes=0, batch=16
    )
    fetched: list[int] = []
    fetch = BlockStream._fetch

    def noted(own: BlockStream, number: int, sources: Any) -> Any:
        fetched.append(number)
        return fetch(own, number, sources)

    monkeypatch.setattr(BlockStream, "_fetch", noted)
    passed.measure(None, LARGE, "true")
    assert fetched == [0, 1, 2, 2, 1, 0]


class Inline:
    """In place of a thread, in which the stand-in for an accelerator would not be active."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def submit(self, work: Callable[..., Any], *given: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*given))
        return done


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """An accelerator that copies of models know of too, and on which nothing runs in threads."""

    def copied(model: nn.Module) -> nn.Module:
        made = replicate(model)
        for own, parameter in zip(made.parameters(), model.parameters(), strict=True):
            own.__dict__["_accelerated"] = on_accelerator(parameter)
        return made

    monkeypatch.setattr("evo_hpo.models.gates.replicate", copied)
    monkeypatch.setattr("evo_hpo.models.streaming.ThreadPoolExecutor", Inline)
    return StandIn()


def watched(model: nn.Module, seen: list[set[int]]) -> None:
    """Notes which blocks are on the accelerator whenever one runs."""
    blocks = list(decoder_blocks(model).values())

    def note(*_: Any) -> None:
        seen.append({n for n, b in enumerate(blocks) if any(on_accelerator(p) for p in b.parameters())})

    for block in blocks:
        next(iter(block.children())).register_forward_hook(note)


def test_the_first_device_has_the_rest_of_a_model_and_the_second_its_blocks(stand_in: StandIn) -> None:
    model = tiny_model("llama")
    levels = RoundedLevels(model)
    candidates = random_assignments(4, len(levels.units), 3)
    expected = losses_of(make_evaluator((model, levels)), candidates)
    with stand_in:
        stages = Stages.spread(model, ["cpu", "cuda"])
        blocks = decoder_blocks(model)
        assert [stages(f"{name}.mlp.up_proj") for name in blocks] == ["cpu", "cpu", "cuda"]
        assert [any(on_accelerator(p) for p in block.parameters()) for block in blocks.values()] == [False, False, True]
        assert stages("model.embed_tokens") == "cpu"
        evaluator = make_evaluator((model, levels))
        assert losses_of(evaluator, candidates) == expected
        placed = [any(map(on_accelerator, b.parameters())) for b in evaluator.pool.replicas[0].gated.blocks.values()]
        assert placed == [False, False, True]


def test_one_block_at_a_time_is_on_the_device(folder: Path, stand_in: StandIn) -> None:
    loaded = load_model(str(folder / "model"))
    store = LevelStore.open(folder / "store", memory="streamed")
    tokens, candidates = tiny_tokens(length=LENGTH), random_assignments(4, len(store.units), 3)
    expected = losses_of(Evaluator(loaded.model, store, tokens, threads=1, packed_bytes=0), candidates)
    seen: list[set[int]] = []
    with stand_in:
        beside_blocks(loaded.model, "cuda")
        evaluator = Evaluator(
            loaded.model, LevelStore.open(folder / "store", memory="streamed", device="cuda"), tokens, stream=True
        )
        watched(evaluator.pool.replicas[0].gated.model, seen)
        assert losses_of(evaluator, candidates) == pytest.approx(expected, rel=1e-5)  # other chunks than a CPU's
        assert not any(
            on_accelerator(p) for b in evaluator.pool.replicas[0].gated.blocks.values() for p in b.parameters()
        )
    assert seen
    assert all(len(places) == 1 for places in seen)


def test_a_task_takes_devices_or_streams(folder: Path) -> None:
    settings: dict[str, Any] = {
        "model": str(folder / "model"),
        "method": "rtn",
        "levels": (2, 3, 8),
        "store": str(folder / "store"),
        "build": {"group_size": 16},
        "sequence_length": 16,
        "calibration_tokens": 64,
        "held_out_tokens": 32,
        "tokens": 32,
        "dtype": "float32",
    }
    found = []
    for own in ({}, {"devices": ["cpu", "cpu"]}, {"memory": "streamed"}):
        problem = LanguageModelTask(**settings, **own).make()
        assignment = (1,) * len(problem.space.units)
        found.append((problem.score([assignment], Minibatch(0, 32))[0].loss, problem.validate(assignment)))
    assert found[0] == found[1] == found[2]


def test_a_task_finds_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    task = LanguageModelTask(model="any", device="auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert (task.placement.main, task.builders) == ("cpu", ("cpu",))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (task.placement.main, task.builders) == ("cuda:0", ("cuda:0", "cuda:1"))
    assert LanguageModelTask(model="any").builders == ("cpu",)
    assert LanguageModelTask(model="any", devices=("cuda:1", "cpu")).builders == ("cuda:1", "cpu")


def test_placements_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InvalidSettingError, match="memory='remote' must be one of: resident, packed, streamed"):
        Placement("cpu", (), "remote")
    for wrong in ({"device": "gpu"}, {"device": "cuda:x"}, {"devices": ("cuda:0", "gpu")}):
        with pytest.raises(InvalidSettingError, match="device '(gpu|cuda:x)' is none that torch knows"):
            LanguageModelTask(model="any", **wrong)
    with pytest.raises(InvalidSettingError, match="devices=.* spread a model that stays there"):
        Placement("cpu", ("cpu", "cpu"), "streamed")
    with pytest.raises(InvalidSettingError, match="give one of them"):
        Placement("cuda", ("cpu", "cpu"), "packed")
    shared = tiny_model("llama")
    first, *_, last = decoder_blocks(shared).values()
    last.mlp.up_proj.weight = first.mlp.up_proj.weight  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"layers\.0 and .*layers\.2 share a weight"):
        Stages.spread(shared, ["cpu", "cuda"])
