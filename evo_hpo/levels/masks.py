"""Which weights to remove: exact counts over a whole matrix or in each row, or n of every m."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from evo_hpo.errors import InvalidSettingError


@dataclass(frozen=True)
class Pattern:
    """Of every `of` consecutive inputs of a row, `keep` are kept (2:4 runs fast on some accelerators)."""

    keep: int
    of: int


@dataclass(frozen=True)
class Sparsity:
    """One level: a share of weights to remove plus a number of weights (both exact), or a pattern."""

    label: str
    share: Fraction
    extra: int = 0
    pattern: Pattern | None = None

    def removed(self, size: int) -> int:
        """Number of weights to remove of `size`."""
        return min(max(round(self.share * size) + self.extra, 0), size)

    def fits(self, size: int) -> bool:
        """Whether a layer of so many weights has those that the extra ones would take from it or give back to it."""
        return 0 <= round(self.share * size) + self.extra <= size

    @property
    def spelling(self) -> str:
        """The share or pattern as text: exact, and the same however it was given."""
        if self.pattern is not None:
            return self.label
        short = (text for text in (f"{float(self.share):g}", repr(float(self.share))) if Fraction(text) == self.share)
        return next(short, str(self.share))


def parse_sparsities(
    sparsities: Sequence[float | str], step: int | None = None, steps: int = 8
) -> tuple[Sparsity, ...]:
    """Levels from sparsities (0 to 1) and patterns ("2:4" keeps 2 of 4), most sparse first.

    Args:
        step: with it, `sparsities` must be one number, the centre; the levels are `steps` steps to either side, each
            removing `step` weights more in every unit whatever its size, so that any two units can exchange steps
            at equal cost (EvoPress, section on unstructured sparsity); a layer has those that fit it.

    Raises:
        InvalidSettingError: out of range, repeated, or none.
    """
    if step is not None:
        if len(sparsities) != 1 or step < 1 or steps < 1:
            raise InvalidSettingError(
                f"step={step}, steps={steps}, sparsities={list(sparsities)}: need one centre, step >= 1"
            )
        centre = _one(sparsities[0])
        if centre.pattern is not None:
            raise InvalidSettingError(
                f"step={step} moves a share of weights, and {centre.label!r} is a pattern: give a sparsity from 0 to 1"
                " as the centre, or leave step out"
            )
        return tuple(Sparsity(f"{offset:+d}", centre.share, offset * step) for offset in range(steps, -steps - 1, -1))
    levels = [_one(value) for value in sparsities]
    if not levels or len({level.label for level in levels}) != len(levels):
        raise InvalidSettingError(f"sparsities={list(sparsities)} must be at least one, each once")
    return tuple(sorted(levels, key=lambda level: -level.share))


def as_share(value: float | str, otherwise: str = "") -> Fraction:
    """A sparsity as an exact share of all weights.

    Args:
        otherwise: what else it could have been, for the message.

    Raises:
        InvalidSettingError: it is no number from 0 to 1.
    """
    try:
        share = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        share = Fraction(-1)
    if not 0 <= share <= 1:
        raise InvalidSettingError(f"sparsity {value!r} must be a number from 0 to 1{otherwise}")
    return share


def _one(value: float | str) -> Sparsity:
    if found := re.fullmatch(r"(\d+):(\d+)", str(value)):
        keep, of = int(found.group(1)), int(found.group(2))
        if not 0 <= keep <= of or of < 1:
            raise InvalidSettingError(f"pattern {value!r} must keep n of m with 0 <= n <= m")
        return Sparsity(str(value), 1 - Fraction(keep, of), pattern=Pattern(keep, of))
    share = as_share(value, " or a pattern such as '2:4'")
    return Sparsity(f"{float(share):g}", share)


def lowest(score: torch.Tensor, count: int) -> torch.Tensor:
    """True at exactly `count` entries with the lowest scores (any shape)."""
    flat = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    if count > 0:
        flat[torch.topk(score.reshape(-1), count, largest=False, sorted=False).indices] = True
    return flat.view(score.shape)


def lowest_in_each_row(score: torch.Tensor, count: int) -> torch.Tensor:
    """True at `count` entries in all, spread evenly over the rows; in each row the lowest scores."""
    rows, columns = score.shape
    rank = score.argsort(dim=1).argsort(dim=1)
    share = torch.arange(rows + 1, dtype=torch.int64) * count // rows
    return rank < share.diff().to(score.device).unsqueeze(1).clamp_(max=columns)


def lowest_n_of_m(score: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """True at the entries that n:m sparsity removes; groups run along the last dimension, the last may be shorter."""
    width = score.shape[-1]
    padded = math.ceil(width / pattern.of) * pattern.of
    full = torch.nn.functional.pad(score, (0, padded - width), value=-math.inf)
    rank = full.view(*score.shape[:-1], -1, pattern.of).argsort(dim=-1).argsort(dim=-1)
    return (rank < pattern.of - pattern.keep).view(*score.shape[:-1], padded)[..., :width]
