"""Gradients with respect to final hidden states and logits, never more than a chunk of logits at a time.

The gradient of a log-likelihood is the label's row of the head less the expected row, that of KL(p || q) is the row
expected under q less the one expected under p; with a soft cap each row is weighted by the cap's slope at its logit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evo_hpo.scoring.head import OutputHead

Reference = tuple[OutputHead, Tensor]
"""The uncompressed model's head and final hidden states, tokens x hidden."""


@dataclass(frozen=True)
class _Own:
    """A model's own distribution.

    Attributes:
        hidden: scaled final hidden states, tokens x hidden.
        expected: expected row of the head, float32, tokens x hidden.
        top: the largest logit of each token.
        masses: sum of exp(logit - top) over each chunk of the vocabulary, tokens x chunks.
    """

    hidden: Tensor
    expected: Tensor
    top: Tensor
    masses: Tensor


def sampled_labels(head: OutputHead, hidden: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Labels drawn from the model's own distribution, and the gradient of their log-likelihood.

    Args:
        hidden: final hidden states, tokens x hidden.
        uniforms: float64 in [0, 1), one a token: the label is where the cumulative probability passes it.

    Returns:
        Vocabulary entries (tokens), and the gradient (tokens x hidden, in the dtype of ``hidden``).
    """
    own = _own(head, hidden)
    cumulative = own.masses.double().cumsum(-1)
    wanted = uniforms * cumulative[:, -1]
    chosen = (cumulative <= wanted[:, None]).sum(-1).clamp_max(cumulative.shape[1] - 1)
    before = cumulative.gather(1, chosen[:, None])[:, 0] - own.masses.double().gather(1, chosen[:, None])[:, 0]
    labels = torch.empty_like(chosen)
    for number, entries in enumerate(head.entries()):
        for rows in torch.split((chosen == number).nonzero()[:, 0], head.chunk.tokens):
            mass = (head.logits(own.hidden[rows], entries) - own.top[rows, None]).double().exp_().cumsum(-1)
            place = (mass <= (wanted - before)[rows, None]).sum(-1)
            labels[rows] = entries.start + place.clamp_max(mass.shape[1] - 1)
    return labels, _likelihood(head, own, labels).to(hidden.dtype)


def likelihood_gradient(head: OutputHead, hidden: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the labels' summed log-likelihood (tokens x hidden)."""
    return _likelihood(head, _own(head, hidden), labels).to(hidden.dtype)


def divergence_gradient(head: OutputHead, hidden: Tensor, reference: Reference) -> Tensor:
    """Gradient of the summed KL(dense || own), tokens x hidden.

    Args:
        hidden: final hidden states, tokens x hidden.
    """
    own, (first, dense) = _own(head, hidden), reference
    if head.cap is None and first is head:
        return ((own.expected - _own(head, dense).expected) * head.scale).to(hidden.dtype)
    under_dense, scaled = torch.zeros_like(own.expected), first.scaled(dense)
    normaliser = first.log_normaliser(scaled)
    for entries in head.entries(len(hidden)):
        p = (first.logits(scaled, entries) - normaliser[:, None]).exp_()
        slope = 1.0 if head.cap is None else _slope(head, head.logits(own.hidden, entries))
        under_dense += p.mul_(slope) @ head.weight[entries].float()
    return ((own.expected - under_dense) * head.scale).to(hidden.dtype)


def logit_gradients(
    head: OutputHead, hidden: Tensor, labels: Tensor | None = None, reference: Reference | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Gradient with respect to the products of head and hidden states, before scale and cap, chunk by chunk.

    Args:
        hidden: final hidden states, tokens x hidden.
        labels: of their summed log-likelihood; without them of the summed KL(reference || own).

    Yields:
        Entries of the vocabulary, and the gradient (tokens x entries, float32).
    """
    scaled = head.scaled(hidden)
    normaliser = head.log_normaliser(scaled)
    first, dense = reference or (head, hidden)
    wanted = first.scaled(dense)
    theirs = normaliser if reference is None else first.log_normaliser(wanted)
    for entries in head.entries(len(hidden)):
        logits = head.logits(scaled, entries)
        found = (logits - normaliser[:, None]).exp_()
        if labels is None:
            found -= (first.logits(wanted, entries) - theirs[:, None]).exp_()
        else:
            rows = ((labels >= entries.start) & (labels < entries.stop)).nonzero()[:, 0]
            found.neg_()[rows, labels[rows] - entries.start] += 1
        yield entries, found * _slope(head, logits) * head.scale


def _likelihood(head: OutputHead, own: _Own, labels: Tensor) -> Tensor:
    rows = head.weight[labels].float()
    if head.cap is not None:
        rows *= _slope(head, head.selected(own.hidden, labels[:, None]))
    return (rows - own.expected) * head.scale


def _own(head: OutputHead, hidden: Tensor) -> _Own:
    parts = [_own_part(head, part) for part in torch.split(head.scaled(hidden), head.chunk.tokens)]
    return _Own(*(torch.cat([getattr(p, name) for p in parts]) for name in ("hidden", "expected", "top", "masses")))


def _own_part(head: OutputHead, hidden: Tensor) -> _Own:
    """In one pass over the vocabulary; all sums are relative to the largest logit so far."""
    top = hidden.new_full((len(hidden),), -1e30, dtype=torch.float32)
    expected = torch.zeros_like(hidden, dtype=torch.float32)
    masses, tops = [], []
    for entries in head.entries():
        logits = head.logits(hidden, entries)
        higher = torch.maximum(top, logits.amax(-1))
        slope = None if head.cap is None else _slope(head, logits)
        p = logits.sub_(higher[:, None]).exp_()
        masses.append(p.sum(-1))
        tops.append(higher)
        weighted = p if slope is None else p * slope
        expected *= (top - higher).exp()[:, None]
        expected += (weighted.to(head.weight.dtype) @ head.weight[entries]).float()
        top = higher
    scaled = torch.stack(masses, dim=1) * (torch.stack(tops, dim=1) - top[:, None]).exp()
    return _Own(hidden, expected / scaled.sum(-1, keepdim=True), top, scaled)


def _slope(head: OutputHead, logits: Tensor) -> Tensor:
    """Derivative of the soft cap at capped logits."""
    return 1.0 if head.cap is None else 1 - (logits / head.cap) ** 2  # type: ignore[return-value]
