"""The evaluator's losses against full logits of a plain model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

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


def test_a_dropped_weight_is_gone_from_every_layer_that_has_it() -> None:
    def make() -> torch.nn.Module:
        model: Any = tiny_model("llama")
        model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        return model  # type: ignore[no-any-return]

    class Dropping(RoundedLevels):
        def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
            found = super().weights(unit, level)
            return found if level else dict.fromkeys(found)

    class Zeros(RoundedLevels):
        def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
            found = super().weights(unit, level)
            return found if level else {name: torch.zeros_like(w) for name, w in found.items() if w is not None}

    model = make()
    shared = next(n for n, u in enumerate(RoundedLevels(model).units) if u.name.endswith("0.mlp.up_proj"))
    kept = (2,) * len(RoundedLevels(model).units)
    candidates = [kept[:shared] + (0,) + kept[shared + 1 :], kept]
    evaluator = Evaluator(model, Dropping(model), tiny_tokens(), threads=1)
    chosen = tiny_tokens()[list(sequences_of(MINIBATCH, 8, 12))]
    expected = [float(plain_losses(make, Zeros(model), c, chosen)[0].mean()) for c in candidates]
    for some in (candidates, candidates[:1], candidates[1:]):  # dropped, and there again
        found = [evaluator.evaluate_held_out(c, chosen)["loss"] for c in some]
        np.testing.assert_allclose(found, [expected[candidates.index(c)] for c in some], rtol=1e-4)


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
