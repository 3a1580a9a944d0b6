"""The evaluator's losses against full logits of a plain model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evo_hpo.scoring import head, kernels
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.head import Chunk
from evo_hpo.scoring.kernels import Part, logits_of
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.search.problem import Minibatch
from tests.tiny import (
    ARCHITECTURES,
    RoundedLevels,
    plain_losses,
    random_assignments,
    tiny_model,
    tiny_tokens,
)

MINIBATCH = Minibatch(seed=5, tokens=60)


def _expected(name: str, levels: RoundedLevels, assignment: tuple[int, ...], fitness: str) -> float:
    tokens = tiny_tokens()
    chosen = tokens[list(sequences_of(MINIBATCH, len(tokens), tokens.shape[1]))]
    divergence, loss = plain_losses(lambda: tiny_model(name), levels, assignment, chosen)
    return float((divergence if fitness == "kl" else loss).double().mean())


@pytest.mark.parametrize("fitness", ["kl", "perplexity"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_equal_the_plain_computation(name: str, fitness: str) -> None:
    model = tiny_model(name)
    levels = RoundedLevels(model)
    candidates = random_assignments(6, len(levels.units), 3)
    evaluator = Evaluator(model, levels, tiny_tokens(), fitness=fitness, threads=1, batch_size=2)  # type: ignore[arg-type]
    scores = evaluator.score(candidates, MINIBATCH)
    expected = [_expected(name, levels, c, fitness) for c in candidates]
    assert max(expected) > 0.01
    np.testing.assert_allclose([s.loss for s in scores], expected, rtol=1e-5)
    assert all(s.tokens == 60 and not s.stopped for s in scores)
    assert evaluator.report()["blocks_shared"] > 0


def test_a_bfloat16_model_is_scored_in_its_own_arithmetic() -> None:
    def make() -> torch.nn.Module:
        return tiny_model("llama").to(torch.bfloat16)

    model, tokens = make(), tiny_tokens()
    levels = RoundedLevels(model)
    candidates = random_assignments(3, len(levels.units), 3)
    evaluator = Evaluator(model, levels, tokens, threads=1)
    scores = evaluator.score(candidates, MINIBATCH)
    chosen = tokens[list(sequences_of(MINIBATCH, len(tokens), tokens.shape[1]))]
    expected = [float(plain_losses(make, levels, c, chosen)[0].mean()) for c in candidates]
    np.testing.assert_allclose([s.loss for s in scores], expected, rtol=0.01)
    assert evaluator.report()["dense_bytes"] == len(chosen) * 11 * 32 * 2


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_no_logits_of_a_whole_sequence_are_ever_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    levels = RoundedLevels(model)
    evaluator = Evaluator(model, levels, tiny_tokens(), threads=1, chunk=Chunk(tokens=4, vocabulary=16))
    sizes: list[int] = []

    def watched(hidden: torch.Tensor, part: Part) -> torch.Tensor:
        result = logits_of(hidden, part)
        sizes.append(result.numel())
        return result

    for module in (kernels, head):
        monkeypatch.setattr(module, "logits_of", watched)
    candidate = random_assignments(1, len(levels.units), 3)[0]
    loss = evaluator.score([candidate], MINIBATCH)[0].loss
    assert loss == pytest.approx(_expected(name, levels, candidate, "kl"), rel=1e-5)
    assert max(sizes) == 4 * 16
