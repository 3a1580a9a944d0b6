"""The innermost steps: what is done with one chunk of logits. Pure functions, so that they can be compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evo_hpo.scoring.prepacking import linear

Part = tuple[Tensor, Tensor | None, float | None]
"""Some rows of the head: weight (entries x hidden), bias (entries), soft cap."""


def logits_of(hidden: Tensor, part: Part) -> Tensor:
    """Logits of some vocabulary entries (tokens x entries), float32."""
    weight, bias, cap = part
    logits = linear(hidden, weight, bias).float()
    return logits if cap is None else (logits / cap).tanh_().mul_(cap)


def exp_sums(hidden: Tensor, part: Part) -> Tensor:
    """Sum of exp(logit) over the entries (tokens), without a shift."""
    return logits_of(hidden, part).exp_().sum(-1)


def running_sums(hidden: Tensor, part: Part, top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the entries to sums of exp(logit - top); top is the largest logit so far."""
    logits = logits_of(hidden, part)
    largest = torch.maximum(top, logits.amax(-1))
    return largest, total * (top - largest).exp() + logits.sub_(largest[:, None]).exp_().sum(-1)


def dense_sums(
    own: Tensor, part: Part, top: Tensor, mass: Tensor, entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Adds the entries to the uncompressed model's sums, all relative to its largest logit so far.

    Args:
        own: its final hidden states.
        mass: sum of p = exp(logit - top).
        entropy: sum of p (logit - top), float64.

    Returns:
        p (tokens x entries), the new top, mass and entropy; and fade, drop: a sum of p x that began with the old top is
        fade (sum + drop) with the new one, when every x is relative to the top too.
    """
    logits = logits_of(own, part)
    largest = torch.maximum(top, logits.amax(-1))
    fade, drop = (top - largest).exp(), (top - largest) * mass
    p = logits.sub_(largest[:, None]).exp()
    return p, largest, fade * mass + p.sum(-1), fade * (entropy + drop) + logits.mul_(p).sum(-1), fade, drop


def candidate_sums(
    final: Tensor, part: Part, p: Tensor, top: Tensor, fade: Tensor, drop: Tensor, own: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the entries to a candidate's sums.

    Args:
        p, top, fade, drop: what :func:`dense_sums` gave for these entries.
        own: sum of p (logit - top), float64; the candidate's largest logit; its sum of exp(logit - largest).
    """
    crossed, highest, total = own
    logits = logits_of(final, part).sub_(top[:, None])
    crossed = fade * (crossed + drop) + torch.linalg.vecdot(p, logits)
    higher = torch.maximum(highest, logits.amax(-1) + top)
    now = logits.sub_((higher - top)[:, None]).exp_().sum(-1)
    return crossed, higher, total * (highest - higher).exp() + now


def shared_sums(
    final: Tensor, part: Part, p: Tensor, top: Tensor, fade: Tensor, drop: Tensor, own: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`candidate_sums`, but its exponentials are relative to the same logit as p is, so that one loop does.

    Their sum overflows, or vanishes, where the candidate's logits are far from the uncompressed model's.
    """
    crossed, _, total = own
    logits = logits_of(final, part).sub_(top[:, None])
    crossed = fade * (crossed + drop) + torch.linalg.vecdot(p, logits)
    return crossed, top, total * fade + logits.exp_().sum(-1)


@dataclass(frozen=True)
class Kernels:
    """The steps as they are run: as written above, or compiled.

    Attributes:
        fused: what a step does to a chunk takes one loop where it can, so that :func:`shared_sums` is the faster one.
            (Eager it would gain one per cent, and change the last bits of all losses in 16 bits.)
    """

    exp_sums: Callable[..., Any] = exp_sums
    running_sums: Callable[..., Any] = running_sums
    dense_sums: Callable[..., Any] = dense_sums
    candidate_sums: Callable[..., Any] = candidate_sums
    shared_sums: Callable[..., Any] = shared_sums
    fused: bool = False

    @classmethod
    def compiled(cls, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Kernels:
        """Each as ``compiler(step)``."""
        return cls(
            compiler(exp_sums),
            compiler(running_sums),
            compiler(dense_sums),
            compiler(candidate_sums),
            compiler(shared_sums),
            fused=True,
        )
