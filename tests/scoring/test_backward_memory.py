"""Memory of a backward pass: what it keeps, what it gives up, and what it leaves behind."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import LlamaConfig

from evo_hpo.levels.levels import Levels
from evo_hpo.scoring.backward import BackwardReplica
from evo_hpo.scoring.sensitivities import SensitivityPass
from evo_hpo.search.problem import Minibatch
from tests.scoring.evaluators import Parts, make_evaluator
from tests.tiny import (
    VOCABULARY,
    DropLevels,
    RoundedLevels,
    random_assignments,
    random_model,
    tiny_model,
    tiny_tokens,
)

MINIBATCH = Minibatch(seed=5, tokens=60)


@pytest.mark.parametrize("first", ["dropped", "its modules dropped", "its attention dropped", "smaller"])
def test_no_more_graphs_are_kept_where_the_first_block_says_little_of_the_others(first: str) -> None:
    """Of the others as many as where the first one is like them."""

    def kept(model: nn.Module, levels: Levels, at: Sequence[int], graph_bytes: int) -> tuple[int, Any]:
        passed = SensitivityPass(model, levels, tiny_tokens(), graph_bytes=graph_bytes)
        (replica,), graphs = passed._replicas, []
        through = replica.through

        def noted(number: int) -> None:
            graphs.append(sum(s.output is not None for run in replica._runs for s in run.segments))
            through(number)

        replica.through = noted  # type: ignore[method-assign]
        found = passed.measure(tuple(at), MINIBATCH, "kl").projections
        return graphs[0], found

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model, other = (random_model(config, spread=0.25) for _ in range(2))
    pairs: list[tuple[nn.Module, Levels]]
    levels: Levels
    if first == "smaller":
        layers: Any = other.get_submodule("model.layers.0.mlp")
        for layer in (layers.gate_proj, layers.up_proj):
            layer.weight = Parameter(layer.weight[:4].detach().clone())
        layers.down_proj.weight = Parameter(layers.down_proj.weight[:, :4].detach().clone())
        pairs = [(each, RoundedLevels(each)) for each in (model, other)]
        states = [[1] * len(levels.units) for _, levels in pairs]
    else:
        levels = DropLevels(model, ["block"] if first == "dropped" else ["attention", "mlp"])
        pairs = [(model, levels), (model, levels)]
        gone = ".0.self_attn" if "attention" in first else ".0"
        states = [[1] * len(levels.units), [0 if gone in unit.name else 1 for unit in levels.units]]
    for graph_bytes, count in ((1, 0), (1 << 18, 3)):
        graphs = [kept(*pair, at, graph_bytes)[0] for pair, at in zip(pairs, states, strict=True)]
        assert graphs == [5 * count] * 2  # of five sequences
    _, whole = kept(*pairs[1], states[1], 1 << 30)
    np.testing.assert_array_equal(kept(*pairs[1], states[1], 1 << 18)[1], whole)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_pass_that_failed_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, llama: Parts, threads: int) -> None:
    """It fails on the way back, when some sequences have been through a block and others have not."""
    pool = make_evaluator(llama, threads=threads).pool
    sensitivities = SensitivityPass(*llama, tiny_tokens(), pool=pool)
    expected = sensitivities.measure(None, MINIBATCH)
    through, calls = BackwardReplica._through, itertools.count()

    def failing(*args: Any) -> None:
        if next(calls) == 2:
            raise OSError
        through(*args)

    with monkeypatch.context() as patch:
        patch.setattr(BackwardReplica, "_through", failing)
        with pytest.raises(OSError):
            sensitivities.measure(None, MINIBATCH)
    assert not any(replica._runs for replica in sensitivities._replicas)
    found = sensitivities.measure(None, MINIBATCH)
    np.testing.assert_array_equal(found.projections, expected.projections)
    assert sensitivities.measure(None, Minibatch(5, 12)).projections.shape[0] == 1


@pytest.mark.parametrize(("threads", "most"), [(1, 5), (1, 2), (2, 1)])
def test_where_memory_runs_out_a_pass_takes_less_at_once(
    monkeypatch: pytest.MonkeyPatch, llama: Parts, threads: int, most: int
) -> None:
    pool = make_evaluator(llama, threads=threads).pool
    expected = SensitivityPass(*llama, tiny_tokens(), pool=pool).measure(None, MINIBATCH)
    begin, seen = BackwardReplica.begin, []

    def greedy(replica: BackwardReplica, *args: Any) -> None:
        begin(replica, *args)
        if replica.kept_from < replica.blocks or len(args[1]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(len(args[1]))

    monkeypatch.setattr(BackwardReplica, "begin", greedy)
    found = SensitivityPass(*llama, tiny_tokens(), pool=pool).measure(None, MINIBATCH)
    assert max(seen) <= most
    np.testing.assert_array_equal(found.projections, expected.projections)
    np.testing.assert_array_equal(found.squares, expected.squares)
    most, too_much = 0, SensitivityPass(*llama, tiny_tokens(), pool=pool)
    with pytest.raises(MemoryError):
        too_much.measure(None, MINIBATCH)


def test_after_a_pass_no_replica_holds_levels() -> None:
    """Decoded weights of a large model are as many bytes as the model."""
    model = tiny_model("llama")
    levels = RoundedLevels(model)
    passed = SensitivityPass(model, levels, tiny_tokens(), pool=make_evaluator((model, levels), threads=2).pool)
    passed.measure(random_assignments(1, len(levels.units), 3)[0], MINIBATCH, "kl")
    own = {p.data_ptr() for p in model.parameters()}
    assert len(passed._replicas) == 2
    for replica in passed._replicas:
        assert {p.data_ptr() for p in replica.gated.model.parameters()} == own


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
