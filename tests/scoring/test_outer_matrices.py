"""Embedding and head as units: losses against full logits of a plain model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from evo_hpo.errors import StoreError
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.search.problem import Minibatch
from tests.tiny import ARCHITECTURES, RoundedLevels, plain_losses, random_assignments, tiny_model, tiny_tokens

MINIBATCH = Minibatch(seed=5, tokens=60)


def candidates_of(levels: RoundedLevels, count: int = 8) -> list[tuple[int, ...]]:
    """Different in the outer units, which come last, and inside."""
    inside = random_assignments(count, len(levels.units), 3)
    return [*inside, *((*inside[0][:-2], a, b) for a in range(3) for b in range(3) if (a, b) != inside[0][-2:])]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_equal_the_plain_computation(name: str) -> None:
    """Of candidates with embeddings and heads of their own, tied ones included; the reference keeps its own."""
    model, tokens = tiny_model(name), tiny_tokens()
    levels = RoundedLevels(model, outer=True)
    tied = model.config.tie_word_embeddings  # type: ignore[union-attr]
    assert len(levels.units) == len(RoundedLevels(model).units) + (1 if tied else 2)
    candidates = candidates_of(levels)
    chosen = tokens[list(sequences_of(MINIBATCH, len(tokens), tokens.shape[1]))]
    plain = [plain_losses(lambda: tiny_model(name), levels, c, chosen) for c in candidates]
    for number, fitness in enumerate(("kl", "perplexity")):
        evaluator = Evaluator(model, levels, tokens, fitness=fitness, threads=1, batch_size=2)  # type: ignore[arg-type]
        scores = evaluator.score(candidates, MINIBATCH)
        expected = [float(p[number].double().mean()) for p in plain]
        np.testing.assert_allclose([s.loss for s in scores], expected, rtol=1e-5)
    held_out = evaluator.evaluate_held_out(candidates[0], chosen)
    expected = [float(x.double().mean()) for x in plain[0]]
    np.testing.assert_allclose([held_out["loss"], held_out["cross_entropy"]], expected, rtol=1e-5)
    assert abs(evaluator.evaluate_held_out(None, chosen)["loss"]) < 1e-6


def test_a_loss_depends_on_nothing_but_the_assignment() -> None:
    model = tiny_model("qwen2")
    levels = RoundedLevels(model, outer=True)
    candidates = candidates_of(levels)
    settings: dict[str, Any] = {"threads": 2, "early_stopping": False}
    together = [s.loss for s in Evaluator(model, levels, tiny_tokens(), **settings).score(candidates, MINIBATCH)]
    one = Evaluator(model, levels, tiny_tokens(), threads=1, state_bytes=0)
    assert together == [one.score([c], MINIBATCH)[0].loss for c in candidates]
    again = Evaluator(model, levels, tiny_tokens(), threads=1)  # block inputs of the best one are used again
    for _ in range(2):
        assert together[::-1] == [again.score([c], MINIBATCH)[0].loss for c in reversed(candidates)]
    streamed = Evaluator(model, levels, tiny_tokens(), threads=1, stream=True)  # which brings the blocks' weights only
    assert together == [s.loss for s in streamed.score(candidates, MINIBATCH)]


def test_the_divergence_of_the_likeliest_entries_takes_the_candidates_head() -> None:
    model = tiny_model("llama")
    levels, tokens = RoundedLevels(model, outer=True), tiny_tokens()
    every = Evaluator(model, levels, tokens, threads=1, fitness="topk_kl", top_k=96)
    full = Evaluator(model, levels, tokens, threads=1)
    candidates = candidates_of(levels, 3)
    found, expected = ([s.loss for s in each.score(candidates, MINIBATCH)] for each in (every, full))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_module_outside_of_blocks_that_is_neither_is_refused() -> None:
    model = tiny_model("opt")
    levels = RoundedLevels(model)
    unit = levels.units[0]
    levels.units[0] = type(unit)("model.decoder.project_in", unit.costs, size=unit.size)
    with pytest.raises(StoreError, match="'model.decoder.project_in' is in no decoder block, nor embedding or head"):
        Evaluator(model, levels, tiny_tokens(), threads=1)


def test_a_bfloat16_model_is_scored_in_its_own_arithmetic() -> None:
    def make() -> torch.nn.Module:
        return tiny_model("llama").to(torch.bfloat16)

    model, tokens = make(), tiny_tokens()
    levels = RoundedLevels(model, outer=True)
    candidates = candidates_of(levels, 3)
    scores = Evaluator(model, levels, tokens, threads=1).score(candidates, MINIBATCH)
    chosen = tokens[list(sequences_of(MINIBATCH, len(tokens), tokens.shape[1]))]
    expected = [float(plain_losses(make, levels, c, chosen)[0].mean()) for c in candidates]
    np.testing.assert_allclose([s.loss for s in scores], expected, rtol=0.01)
