"""Fitness functions, held-out figures and dropped modules beside the plain computation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.search.problem import Minibatch
from tests.scoring.evaluators import LARGE, LENGTH, Parts, losses_of, make_evaluator
from tests.tiny import (
    DropLevels,
    RoundedLevels,
    plain_losses,
    random_assignments,
    tiny_model,
    tiny_tokens,
)


def test_top_k_divergence_pools_the_tail(llama: Parts) -> None:
    model, levels = llama
    candidate = random_assignments(1, len(levels.units), 3)[0]
    loss = losses_of(make_evaluator(llama, fitness="topk_kl", top_k=5), [candidate])[0]
    tokens = tiny_tokens(length=LENGTH)
    chosen = tokens[list(sequences_of(LARGE, len(tokens), LENGTH))]
    with torch.no_grad():
        p = model(input_ids=chosen).logits[:, :-1].double().softmax(-1)
        compressed = tiny_model("llama")
        modules = dict(compressed.named_modules())
        for unit, level in enumerate(candidate):
            for name, weight in levels.weights(unit, level).items():
                modules[name].weight.copy_(weight)
        q = compressed(input_ids=chosen).logits[:, :-1].double().softmax(-1)
    top = p.topk(5).indices
    p, q = (torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)], -1) for x in (p, q))
    assert loss == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)


def test_losses_of_each_sequence_average_to_the_loss(llama: Parts) -> None:
    evaluator = make_evaluator(llama)
    candidate = random_assignments(1, len(llama[1].units), 3)[0]
    sequences = evaluator.score([candidate], LARGE)[0].by_sequence
    assert sequences is not None
    assert len(sequences) == 7
    assert float(np.mean(sequences)) == pytest.approx(losses_of(evaluator, [candidate])[0], rel=1e-12)
    alone = [losses_of(make_evaluator(llama), [candidate], Minibatch(LARGE.seed, n * LENGTH))[0] for n in range(1, 8)]
    running = [m * n - (alone[n - 2] * (n - 1) if n > 1 else 0.0) for n, m in enumerate(alone, start=1)]
    np.testing.assert_allclose(sequences, running, rtol=1e-6)  # the smaller minibatches of one seed tell each apart
    np.testing.assert_array_equal(sequences, evaluator.score([candidate], LARGE)[0].by_sequence)  # found, not read


def test_losses_of_each_sequence_are_the_same_from_cache_company_and_replicas(llama: Parts, tmp_path: Path) -> None:
    candidates = random_assignments(5, len(llama[1].units), 3)
    truth = [s.by_sequence for s in make_evaluator(llama).score(candidates, LARGE)]
    assert [s.by_sequence for s in make_evaluator(llama, threads=2).score(candidates[::-1], LARGE)] == truth[::-1]
    for _ in range(2):  # read, then found in the file
        evaluator = make_evaluator(llama, cache=tmp_path / "scores.sqlite")
        assert [s.by_sequence for s in evaluator.score(candidates, LARGE)] == truth
        evaluator.close()
    assert evaluator.counts["cached"] == 5


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_held_out_figures_equal_the_plain_computation(name: str) -> None:
    model, held_out = tiny_model(name), tiny_tokens(5, 9, seed=3)
    levels = RoundedLevels(model)
    evaluator = Evaluator(model, levels, tiny_tokens(), threads=2)
    candidate = random_assignments(1, len(levels.units), 3)[0]
    figures = evaluator.evaluate_held_out(candidate, held_out)
    divergence, entropy = plain_losses(lambda: tiny_model(name), levels, candidate, held_out)
    assert figures["loss"] == pytest.approx(float(divergence.mean()), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(float(entropy.mean())), rel=1e-5)
    np.testing.assert_allclose(figures["losses"], divergence.mean(1), rtol=2e-5)  # of 8 tokens in 16 bits each
    np.testing.assert_allclose(figures["cross_entropies"], entropy.mean(1), rtol=1e-5)
    assert abs(evaluator.evaluate_held_out(None, held_out)["loss"]) < 1e-6


@pytest.mark.parametrize(("name", "outputs"), [("llama", ("o_proj", "down_proj")), ("gpt2", ("c_proj", "c_proj"))])
def test_a_dropped_module_contributes_nothing(name: str, outputs: tuple[str, str]) -> None:
    model = tiny_model(name)
    levels = DropLevels(model)
    evaluator = Evaluator(model, levels, tiny_tokens(length=LENGTH), threads=1)
    rng = np.random.default_rng(0)
    candidates = [tuple(int(x) for x in rng.integers(2, size=len(levels.units))) for _ in range(5)]
    plain = tiny_model(name)
    for candidate, loss in zip(candidates, losses_of(evaluator, list(dict.fromkeys(candidates))), strict=True):
        plain.load_state_dict(model.state_dict())
        modules = dict(plain.named_modules())
        for number, (unit, level) in enumerate(zip(levels.units, candidate, strict=True)):
            if level == 0:
                last = modules[f"{unit.name}.{outputs[number >= len(levels.units) // 2]}"]
                for parameter in last.parameters():
                    nn.init.zeros_(parameter)
        assert loss == pytest.approx(_divergence(model, plain), rel=1e-5, abs=1e-6)


def test_a_dropped_block_passes_its_input_on() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    levels = DropLevels(model, ["block"])
    evaluator = Evaluator(model, levels, tiny_tokens(length=LENGTH), threads=1)
    layers: Any = plain.model
    layers.layers = nn.ModuleList([layers.layers[0], layers.layers[2]])
    layers.config.num_hidden_layers = 2
    losses = losses_of(evaluator, [(1, 0, 1), (1, 1, 1)])
    assert losses[0] == pytest.approx(_divergence(model, plain), rel=1e-5)
    assert abs(losses[1]) < 1e-6


def _divergence(dense: nn.Module, compressed: nn.Module) -> float:
    tokens = tiny_tokens(length=LENGTH)
    chosen = tokens[list(sequences_of(LARGE, len(tokens), LENGTH))]
    with torch.no_grad():
        log_p, log_q = (
            m(input_ids=chosen, use_cache=False).logits[:, :-1].double().log_softmax(-1) for m in (dense, compressed)
        )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
