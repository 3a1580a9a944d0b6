"""What a candidate loses: KL divergence from the uncompressed model, perplexity, or top-k KL, from final hidden states.

With a linear head, KL(p || q) = sum_v p_v (log p_v - z_qv) + lse(z_q), and sum_v p_v z_qv = h_q . sum_v p_v W_v. So all
that is needed of the uncompressed model is the expected embedding e = sum_v p_v W_v (hidden numbers a token) and one
constant: its logits are made once, ever, and a candidate costs one log-normaliser. The constant is taken as
h_p . e - lse(z_p) with the e that is stored, so that rounding e to 16 bits leaves KL(p || p) = 0 and errs by
(h_p - h_q) . (rounding) only. Where the architecture caps its logits this algebra does not hold, and where logits are
rounded to 16 bits their errors would not cancel: hidden states are stored instead, and a chunk of the uncompressed
model's logits is made once for a group of waiting candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evo_hpo.language_model.head import OutputHead

__all__ = ["DenseSide", "Fitness", "dense_side", "divergences", "cross_entropies"]

Fitness = Literal["kl", "perplexity", "topk_kl"]


@dataclass(frozen=True, slots=True)
class DenseSide:
    """What is kept of the uncompressed model for some tokens.

    Attributes:
        vectors: expected embedding or final hidden state, tokens x hidden (top-k: log-probabilities, tokens x k).
        constants: float64, one a token.
        entries: top-k only: vocabulary entries, int32, tokens x k.
    """

    vectors: Tensor
    constants: Tensor
    entries: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        parts = [self.vectors, self.constants, *([] if self.entries is None else [self.entries])]
        return sum(p.numel() * p.element_size() for p in parts)


def dense_side(head: OutputHead, hidden: Tensor, fitness: Fitness, dtype: torch.dtype, top_k: int) -> DenseSide:
    """What has to be kept of the uncompressed model's final hidden states (tokens x hidden)."""
    hidden = head.scaled(hidden)
    normaliser = head.log_normaliser(hidden)
    if fitness == "topk_kl":
        return _dense_top(head, hidden, normaliser, top_k)
    if not head.linear:
        stored = hidden.to(dtype) if hidden.dtype == torch.float32 else hidden
        return DenseSide(stored, head.log_normaliser(stored.to(hidden.dtype)).double())
    size = head.chunk.tokens
    parts = zip(torch.split(hidden, size), torch.split(normaliser, size), strict=True)
    stored = torch.cat([_expected_embedding(head, part, norm).to(dtype) for part, norm in parts])
    constants = (hidden.double() * stored.double()).sum(-1) - normaliser.double()
    return DenseSide(stored, constants)


def _expected_embedding(head: OutputHead, hidden: Tensor, normaliser: Tensor) -> Tensor:
    expected = torch.zeros_like(hidden)
    for entries in head.entries():
        expected += head.logits(hidden, entries).sub_(normaliser[:, None]).exp_() @ head.weight[entries]
    return expected


def _dense_top(head: OutputHead, hidden: Tensor, normaliser: Tensor, top_k: int) -> DenseSide:
    values, numbers = [], []
    for part, norm in zip(torch.split(hidden, 64), torch.split(normaliser, 64), strict=True):
        logits = head.logits(part, slice(None))
        top = logits.topk(min(top_k, logits.shape[1] - 1), dim=-1)
        values.append(top.values - norm[:, None])
        numbers.append(top.indices.int())
    log_p = torch.cat(values)
    tail = torch.log((1 - log_p.double().exp().sum(-1)).clamp_min(1e-30))
    return DenseSide(log_p, tail, torch.cat(numbers))


def divergences(head: OutputHead, finals: Sequence[Tensor], dense: DenseSide) -> list[Tensor]:
    """Divergence of each candidate from the uncompressed model, nats a token, float64; lower is better.

    Args:
        finals: final hidden states of each candidate, tokens x hidden, for the tokens of ``dense``.
    """
    finals = [head.scaled(f) for f in finals]
    if dense.entries is not None:
        return [_top_divergence(head, f, dense, dense.entries) for f in finals]
    if head.linear:
        return [
            head.log_normaliser(f).double() + dense.constants - (f.double() * dense.vectors.double()).sum(-1)
            for f in finals
        ]
    parts = [
        _pairwise(head, [f[i : i + head.chunk.tokens] for f in finals], dense, slice(i, i + head.chunk.tokens))
        for i in range(0, len(dense.constants), head.chunk.tokens)
    ]
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def _pairwise(head: OutputHead, finals: Sequence[Tensor], dense: DenseSide, tokens: slice) -> list[Tensor]:
    """For some tokens: each chunk of the uncompressed model's logits is made once for all candidates."""
    own, normaliser = dense.vectors[tokens].to(finals[0].dtype), dense.constants[tokens].float()
    entropy = torch.zeros_like(normaliser, dtype=torch.float64)
    crossed = [torch.zeros_like(entropy) for _ in finals]
    totals = [torch.zeros_like(normaliser) for _ in finals]
    shifts = [normaliser for _ in finals]  # the largest logit so far, and at least where the dense model's mass is
    for entries in head.entries():
        log_p = head.logits(own, entries).sub_(normaliser[:, None])
        p = log_p.exp()
        entropy += log_p.mul_(p).sum(-1)
        for i, final in enumerate(finals):
            logits = head.logits(final, entries).sub_(normaliser[:, None])
            crossed[i] += torch.linalg.vecdot(p, logits)
            shift = torch.maximum(shifts[i], logits.amax(-1) + normaliser)
            totals[i] = totals[i] * (shifts[i] - shift).exp() + logits.sub_((shift - normaliser)[:, None]).exp_().sum(
                -1
            )
            shifts[i] = shift
    return [
        entropy - cross + (shift - normaliser).double() + total.double().log()
        for cross, total, shift in zip(crossed, totals, shifts, strict=True)
    ]


def _top_divergence(head: OutputHead, final: Tensor, dense: DenseSide, entries: Tensor) -> Tensor:
    log_p, tail_p = dense.vectors.double(), dense.constants
    log_q = head.selected(final, entries.long()).double() - head.log_normaliser(final).double()[:, None]
    tail_q = torch.log((1 - log_q.exp().sum(-1)).clamp_min(1e-9))
    return (log_p.exp() * (log_p - log_q)).sum(-1) + tail_p.exp() * (tail_p - tail_q)


def cross_entropies(head: OutputHead, final: Tensor, targets: Tensor) -> Tensor:
    """-log q(target) for each token, nats, float64; the exponential of its mean is the perplexity.

    Args:
        final: final hidden states, tokens x hidden.
        targets: the next tokens.
    """
    final = head.scaled(final)
    return head.log_normaliser(final).double() - head.selected(final, targets[:, None])[:, 0].double()
