"""What a candidate loses: KL divergence from the uncompressed model, perplexity, or top-k KL, from final hidden states.

With a linear head, KL(p || q) = sum_v p_v (log p_v - z_qv) + lse(z_q), and sum_v p_v z_qv = h_q . sum_v p_v W_v. So all
that is needed of the uncompressed model is the expected embedding e = sum_v p_v W_v (hidden numbers a token) and one
constant: its logits are made once, ever, and a candidate costs one log-normaliser. The constant is taken as
h_p . e - lse(z_p) with the e that is stored, so that rounding e to 16 bits leaves KL(p || p) = 0 and errs by
(h_p - h_q) . (rounding) only. Where the architecture caps its logits this algebra does not hold, and where logits are
rounded to 16 bits their errors would not cancel; where candidates have heads of their own it would take an e for each
level of the head: hidden states are stored instead, and a chunk of the uncompressed
model's logits is made once for a group of waiting candidates, its normaliser on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from evo_hpo.scoring.dense import DenseSide, PackedSide, pack
from evo_hpo.scoring.head import OutputHead, in_range

Fitness = Literal["kl", "perplexity", "topk_kl"]
FITNESS: tuple[Fitness, ...] = get_args(Fitness)


def dense_side(head: OutputHead, hidden: Tensor, fitness: Fitness, bits: int, top_k: int) -> DenseSide | PackedSide:
    """What has to be kept of the uncompressed model's final hidden states (tokens x hidden).

    Args:
        bits: of each kept number: 16 or 32. Hidden states of 16-bit models are kept as they are.
    """
    hidden = head.scaled(hidden)
    if fitness == "topk_kl":
        return _dense_top(head, hidden, head.log_normaliser(hidden), top_k)
    if not head.linear:
        return pack(hidden) if bits == 16 and hidden.dtype == torch.float32 else DenseSide(hidden)
    size, normaliser = head.chunk.tokens, head.log_normaliser(hidden)
    parts = zip(torch.split(hidden, size), torch.split(normaliser, size), strict=True)
    expected = torch.cat([_expected_embedding(head, part, norm) for part, norm in parts])

    def constants(stored: Tensor) -> Tensor:
        return (hidden.double() * stored.double()).sum(-1) - normaliser.double()

    return pack(expected, constants) if bits == 16 else DenseSide(expected, constants(expected))


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


def divergences(
    head: OutputHead, finals: Sequence[Tensor], dense: DenseSide, own: OutputHead | None = None
) -> list[Tensor]:
    """Divergence of each candidate from the uncompressed model, nats a token, float64; lower is better.

    Args:
        head: of the uncompressed model.
        finals: final hidden states of each candidate, tokens x hidden, for the tokens of ``dense``.
        own: the candidates' head, where it is another one.
    """
    finals, own = [head.scaled(f) for f in finals], own or head
    if dense.entries is not None:
        return [_top_divergence(own, f, dense, dense.entries) for f in finals]
    if dense.constants is not None:
        vectors, constants = dense.vectors.double(), dense.constants
        return [head.log_normaliser(f).double() + constants - (f.double() * vectors).sum(-1) for f in finals]
    size = head.chunk.tokens
    parts = [
        _pairwise(head, own, [f[i : i + size] for f in finals], dense.vectors[i : i + size])
        for i in range(0, len(dense.vectors), size)
    ]
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def _pairwise(head: OutputHead, theirs: OutputHead, finals: Sequence[Tensor], own: Tensor) -> list[Tensor]:
    """For some tokens: each chunk of the uncompressed model's logits is made once for all candidates.

    Every sum is relative to the uncompressed model's largest logit so far, but for a candidate's normaliser, which is
    relative to its own. Compiled on a CPU that one is relative to the former too, where it does not get out of range.
    """
    own = own.to(finals[0].dtype)
    top = own.new_full((len(own),), -1e30, dtype=torch.float32)
    mass = torch.zeros_like(top)
    entropy = torch.zeros_like(top, dtype=torch.float64)
    shared = head.kernels.fused and own.device.type == "cpu"  # on a GPU finding out would cost a wait
    step = head.kernels.shared_sums if shared else head.kernels.candidate_sums
    sums = [(entropy, top, mass) for _ in finals]
    for dense, part in zip(head.parts(), theirs.parts(), strict=True):
        p, top, mass, entropy, fade, drop = head.kernels.dense_sums(own, dense, top, mass, entropy)
        for i, final in enumerate(finals):
            sums[i] = step(final, part, p, top, fade, drop, sums[i])
    weight = mass.double()
    found = []
    for final, (crossed, highest, total) in zip(finals, sums, strict=True):
        if shared and not bool((usable := in_range(total)).all()):
            highest = torch.where(usable, highest, theirs.log_normaliser(final))
            total = torch.where(usable, total, 1.0)
        found.append((entropy - crossed) / weight - weight.log() + (highest - top).double() + total.double().log())
    return found


def _top_divergence(head: OutputHead, final: Tensor, dense: DenseSide, entries: Tensor) -> Tensor:
    log_p, tail_p = dense.vectors.double(), dense.constants
    assert tail_p is not None
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
