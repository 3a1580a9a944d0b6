"""Perplexity of a model on a text, and its divergence from another one, from plain forward passes: no search code.

By chunk: the text is cut into sequences that do not overlap, and all but the first token of each is predicted, as in
GPTQ (Frantar et al., 2023) and EvoPress. Strided: windows overlap, and each predicts only what the one before did not,
so that every token has a context (Radford et al., 2019; the page on perplexity in the documentation of
transformers): lower, and slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

POSITIONS = 128
"""Rows of logits that exist in single precision at one time."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval: Student's t over sequences, which are taken for independent."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], counts: Sequence[int] = ()) -> Estimate:
        """Of one value a sequence; a single sequence has no interval (NaN).

        Args:
            counts: tokens that each value is the mean of, where they differ: the mean is that of all tokens, and its
                variance that of a ratio of two means.
        """
        found, of = np.asarray(values, dtype=float), np.asarray(counts or [1] * len(values), dtype=float)
        mean = float(np.average(found, weights=of))
        if len(found) < 2:
            return cls(mean, math.nan, math.nan)
        spread = (of / of.mean() * (found - mean)).std(ddof=1)
        half = float(stats.t.ppf(0.975, len(found) - 1) * spread / math.sqrt(len(found)))
        return cls(mean, mean - half, mean + half)

    def exp(self) -> Estimate:
        """Of the exponential: of a cross-entropy, the perplexity."""
        return Estimate(*(math.exp(min(v, 700.0)) for v in (self.mean, self.low, self.high)))


@dataclass(frozen=True)
class SequenceFigures:
    """Of each sequence (or window), nats a predicted token.

    Attributes:
        cross_entropy: of the model.
        divergence: KL(original || model); empty without an original.
        counts: predicted tokens; the first of overlapping windows predicts more than the others.
    """

    cross_entropy: tuple[float, ...]
    divergence: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def perplexity(self) -> Estimate:
        """With its interval; lower is better."""
        return Estimate.of(self.cross_entropy, self.counts).exp()

    @property
    def kl(self) -> Estimate | None:
        """From the original, nats a token; lower is better."""
        return Estimate.of(self.divergence, self.counts) if self.divergence else None


@torch.inference_mode()
def measure(model: nn.Module, tokens: Tensor, original: nn.Module | None = None, stride: int = 0) -> SequenceFigures:
    """Figures of a model on tokens.

    Args:
        tokens: int64; sequences x length. With a stride they are one text, row after row.
        original: of the same vocabulary.
        stride: new tokens a window, at most the length; 0: by chunk.
    """
    length = tokens.shape[1]
    windows = [(row, 1) for row in tokens] if not stride else list(_windows(tokens.reshape(-1), length, stride))
    entropies, divergences = [], []
    for window, first in windows:
        targets = window[first:]
        ours = _logits(model, window)[first - 1 : -1]
        theirs = None if original is None else _logits(original, window)[first - 1 : -1]
        entropy = divergence = 0.0
        for start in range(0, len(targets), POSITIONS):
            part = slice(start, start + POSITIONS)
            log_q = torch.log_softmax(ours[part].float(), dim=-1)
            entropy -= float(log_q.gather(-1, targets[part, None].to(log_q.device)).double().sum())
            if theirs is not None:
                log_p = torch.log_softmax(theirs[part].float(), dim=-1)
                divergence += float((log_p.exp() * (log_p - log_q)).double().sum())
        entropies.append(entropy / len(targets))
        divergences.append(divergence / len(targets))
    counts = tuple(len(window) - first for window, first in windows)
    return SequenceFigures(tuple(entropies), tuple(divergences) if original is not None else (), counts)


def _windows(stream: Tensor, length: int, stride: int) -> list[tuple[Tensor, int]]:
    """Windows of a text, each with the place of its first token that no earlier one predicts; whole strides only."""
    found = [(stream[:length], 1)]
    for end in range(length + stride, len(stream) + 1, stride):
        found.append((stream[end - length : end], max(1, length - stride)))
    return found


def _logits(model: Any, window: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=window[None].to(next(model.parameters()).device)).logits[0]
    return logits
