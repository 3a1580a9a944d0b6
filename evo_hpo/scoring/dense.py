"""What is kept of the uncompressed model: 2 bytes for each number of its final hidden state, everything included.

Vectors become 16-bit whole numbers with a scale for each channel. The one constant a token that the divergence needs
rides in the last bits of the first 32 codes, and the scales take the place of the last position, which predicts
nothing: a sequence of n tokens takes n x hidden x 2 bytes. Float16 would spend five bits on a range that the scales
already give, and errs about ten times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDERS = 32
"""Codes whose last bit holds one bit of the token's constant (float32)."""

LARGEST = 32767


@dataclass(frozen=True, slots=True)
class DenseSide:
    """What a divergence reads, for some tokens.

    Attributes:
        vectors: expected embedding or final hidden state, tokens x hidden (top-k: log-probabilities, tokens x k).
        constants: float64, one a token; None where hidden states are kept.
        entries: top-k only: vocabulary entries, int32, tokens x k.
    """

    vectors: Tensor
    constants: Tensor | None = None
    entries: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return _bytes(self.vectors, self.constants, self.entries)

    def open(self) -> DenseSide:
        """Itself: nothing is packed."""
        return self


@dataclass(frozen=True, slots=True)
class PackedSide:
    """The same in 16 bits.

    Attributes:
        codes: int16, tokens x hidden.
        scales: bfloat16, one a channel, so that code x scale is exact in float32.
        riding: whether constants ride in the codes' last bits.
    """

    codes: Tensor
    scales: Tensor
    riding: bool

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return _bytes(self.codes, self.scales)

    def open(self) -> DenseSide:
        """Float32 vectors and float64 constants."""
        if not self.riding:
            return DenseSide(self.codes.float() * self.scales.float())
        codes = self.codes.clone()
        bits = (codes[:, :RIDERS] & 1).long() << torch.arange(RIDERS, device=codes.device)
        codes[:, :RIDERS] &= ~1
        constants = bits.sum(-1).to(torch.int32).view(torch.float32).double()
        return DenseSide(codes.float() * self.scales.float(), constants)


def pack(vectors: Tensor, constants_of: Callable[[Tensor], Tensor] | None = None) -> PackedSide | DenseSide:
    """Packs vectors (tokens x hidden, float32); a model of fewer than 32 channels with constants stays in float32.

    Args:
        constants_of: constants (float64, tokens) that belong to the vectors as they are stored, so that what rounding
            changes to first order is made good in them.
    """
    if constants_of is not None and vectors.shape[1] < RIDERS:
        return DenseSide(vectors, constants_of(vectors))
    scales = (vectors.abs().amax(0).clamp_min(1e-30) * (1.004 / LARGEST)).bfloat16()  # 1.004: rounded down, it suffices
    steps = vectors / scales.float()
    if constants_of is None:
        return PackedSide(steps.round_().short(), scales, False)
    steps[:, :RIDERS] = (steps[:, :RIDERS] / 2).round_() * 2
    codes = steps.round_().short()
    words = constants_of(codes.float() * scales.float()).float().view(torch.int32)
    bits = (words[:, None] >> torch.arange(RIDERS, device=words.device)) & 1
    codes[:, :RIDERS] |= bits.short()
    return PackedSide(codes, scales, True)


def joined(sides: Sequence[PackedSide | DenseSide]) -> DenseSide:
    """Several sequences' in one, ready to be read."""
    opened = [side.open() for side in sides]
    if len(opened) == 1:
        return opened[0]
    constants = [s.constants for s in opened if s.constants is not None]
    entries = [s.entries for s in opened if s.entries is not None]
    return DenseSide(
        torch.cat([s.vectors for s in opened]),
        torch.cat(constants) if constants else None,
        torch.cat(entries) if entries else None,
    )


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
