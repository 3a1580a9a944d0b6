"""Attention by rows: what it computes, when it stands aside, and that losses err no more than before."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from evo_hpo.models.attention import NAME, ROWS, attend_by_rows, attention_by_rows
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.search.problem import Minibatch
from tests.tiny import VOCABULARY, RoundedLevels, random_assignments, random_model, tiny_tokens

LENGTH = 2 * ROWS + 5


def _module(groups: int) -> Any:
    return SimpleNamespace(num_key_value_groups=groups, is_causal=True)


def _inputs(length: int, heads: int, kept: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, h, length, 16, generator=generator, dtype=torch.float64) for h in (heads, kept, kept))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _written_out(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Token by token, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    groups, out = q.shape[1] // k.shape[1], torch.empty(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for head in range(q.shape[1]):
        for token in range(q.shape[2]):
            scores = torch.einsum("bd,btd->bt", q[:, head, token], k[:, head // groups, : token + 1]) * scale
            out[:, head, token] = torch.einsum("bt,btd->bd", scores.softmax(-1), v[:, head // groups, : token + 1])
    return out.transpose(1, 2)


@pytest.mark.parametrize("length", [1, 7, ROWS, ROWS + 1, LENGTH])
@pytest.mark.parametrize(("heads", "kept"), [(3, 3), (6, 2)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("scale", [None, 0.4])
def test_it_is_causal_attention(
    length: int, heads: int, kept: int, dtype: torch.dtype, error: float, scale: float | None
) -> None:
    q, k, v = _inputs(length, heads, kept, dtype)
    found, _ = attention_by_rows(_module(heads // kept), q, k, v, None, scaling=scale)
    expected = _written_out(q, k, v, scale or 1 / math.sqrt(16))
    assert found.shape == expected.shape
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=error, rtol=0)


@pytest.mark.parametrize("kind", ["mask", "not causal", "decoding", "bias"])
def test_anything_but_plain_causal_attention_is_left_to_transformers(kind: str) -> None:
    q, k, v = _inputs(9, 4, 2, torch.bfloat16)
    mask, others = None, dict[str, Any]()
    if kind == "mask":
        mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril().triu(-3)
    elif kind == "not causal":
        others["is_causal"] = False
    elif kind == "decoding":
        q = q[:, :, -1:]
    else:
        others["position_bias"] = torch.randn(1, 4, 9, 9, dtype=torch.bfloat16)
    found, expected = (f(_module(2), q, k, v, mask, **others)[0] for f in (attention_by_rows, sdpa_attention_forward))
    assert torch.equal(found, expected)


def _model() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return random_model(config, spread=0.25)


def test_models_in_other_dtypes_and_with_other_attention_stay() -> None:
    model = _model()
    assert not attend_by_rows(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.set_attn_implementation("eager")  # type: ignore[operator]
    assert not attend_by_rows(half)
    half.set_attn_implementation("sdpa")  # type: ignore[operator]
    assert attend_by_rows(half)
    assert [m.config._attn_implementation for m in (model, half)] == ["sdpa", NAME]  # type: ignore[union-attr]
    assert not attend_by_rows(nn.Linear(2, 2).to(torch.bfloat16))


class _Wider(RoundedLevels):
    """The same weights in float32."""

    def weights(self, unit: int, level: int) -> dict[str, Tensor | None]:
        return {name: None if w is None else w.float() for name, w in super().weights(unit, level).items()}


def test_losses_with_it_are_as_near_to_float32_and_have_a_name_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation itself is left out: it changes last bits, and takes half a minute."""
    monkeypatch.setattr(torch, "compile", lambda code, **_: code)
    model = _model().to(torch.bfloat16)
    levels, tokens = RoundedLevels(model), tiny_tokens(length=LENGTH)
    candidates, minibatch = random_assignments(8, len(levels.units), 3), Minibatch(0, 2 * LENGTH)
    plain, rows = (Evaluator(model, levels, tokens, threads=1, batch_size=2, compile=c) for c in (False, True))
    exact = Evaluator(copy.deepcopy(model).float(), _Wider(model), tokens, threads=1)
    losses = [
        torch.tensor([s.loss for s in e.score(candidates, minibatch)], dtype=torch.float64)
        for e in (exact, plain, rows)
    ]
    errors = [float((found / losses[0] - 1).abs().mean()) for found in losses[1:]]
    assert errors[1] < 1.5 * errors[0] + 1e-3
    assert not np.array_equal(losses[1], losses[2])
    assert (plain.identity.get("attention"), rows.identity.get("attention")) == (None, "by rows")
    assert model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert rows.score([candidates[0]], minibatch)[0].loss == losses[2][0]
    uncompressed = Evaluator(model, levels, tokens, compile=True)
    assert uncompressed.report()["batch_size"] == 1024 // LENGTH
    for evaluator in (plain, rows, exact, uncompressed):
        evaluator.close()
