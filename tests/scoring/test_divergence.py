"""Divergences in 16 bits against float64, with normalisers relative to either model's largest logit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from evo_hpo.scoring import divergence
from evo_hpo.scoring.dense import DenseSide
from evo_hpo.scoring.divergence import divergences
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.head import Chunk, OutputHead
from evo_hpo.scoring.kernels import Kernels
from tests.tiny import RoundedLevels, tiny_model, tiny_tokens


@pytest.fixture(scope="module", params=["as written", "fused"])
def head(request: pytest.FixtureRequest) -> OutputHead:
    model = tiny_model("llama").bfloat16()
    head = Evaluator(model, RoundedLevels(model), tiny_tokens(), threads=1, chunk=Chunk(16, 8)).pool.replicas[0].head
    assert not head.linear
    if request.param == "fused":
        head.kernels = Kernels.compiled(lambda step: step)
    return head


def _hidden(head: OutputHead, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(21, head.weight.shape[1], generator=generator).bfloat16()


def _exact(head: OutputHead, own: Tensor, final: Tensor) -> Tensor:
    log_p, log_q = (functional.linear(h, head.weight).double().log_softmax(-1) for h in (own, final))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("factor", [0.0, 1.0, 30.0, 1e4])
def test_candidates_near_and_far_are_exact(head: OutputHead, factor: float) -> None:
    """At 1e4 the candidate's logits are thousands of nats from the uncompressed model's: nothing is left in range."""
    own, final = _hidden(head, 0), _hidden(head, 1) * factor
    with torch.inference_mode():
        found = divergences(head, [own, final, final], DenseSide(own))
        torch.testing.assert_close(found[1], _exact(head, own, final), rtol=2e-6, atol=2e-6)
    assert torch.equal(found[1], found[2])
    assert float(found[0].abs().max()) < 1e-6


def test_a_normaliser_out_of_range_is_taken_again(head: OutputHead, monkeypatch: pytest.MonkeyPatch) -> None:
    own, final = _hidden(head, 0), _hidden(head, 1) * 1e4
    monkeypatch.setattr(divergence, "in_range", lambda total: torch.ones_like(total, dtype=torch.bool))
    with torch.inference_mode():
        found = divergences(head, [final], DenseSide(own))[0]
    assert bool(torch.isfinite(found).all()) != head.kernels.fused  # relative to its own largest logit it always is


@pytest.mark.parametrize("value", [float("nan"), 1e4, -1e4])
def test_a_token_out_of_range_changes_no_other(head: OutputHead, value: float) -> None:
    final, others = _hidden(head, 1), torch.arange(21) != 3
    with torch.inference_mode():
        alone = divergences(head, [final], DenseSide(_hidden(head, 0)))[0], head.log_normaliser(final)
        final[3, :] *= value
        found = divergences(head, [final], DenseSide(_hidden(head, 0)))[0], head.log_normaliser(final)
    for before, after in zip(alone, found, strict=True):
        assert torch.equal(after[others], before[others])
        assert bool(after[3].isnan()) == math.isnan(value)
