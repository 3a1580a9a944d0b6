"""Whether one assignment is better than another: told sequence by sequence, on as little text as that takes.

The losses of two assignments on the same sequences differ far less from sequence to sequence than the losses
themselves. Their differences are compared with their standard error (Student's paired test, one-sided), and more
sequences are read only while they do not tell (racing: Maron and Moore, "Hoeffding races", 1994).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit


@dataclass(frozen=True, slots=True)
class Differences:
    """Losses of a candidate less those of the incumbent, over the sequences read so far; add what is read next.

    Attributes:
        count: sequences.
        mean: mean difference, nats a token; negative: the candidate is better.
        squares: sum of squared deviations from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def between(cls, candidate: ArrayLike, incumbent: ArrayLike) -> Differences:
        """Of losses on the same sequences, in the same order."""
        apart = np.subtract(candidate, incumbent)
        mean = float(apart.mean())
        return cls(len(apart), mean, float(np.square(apart - mean).sum()))

    def __add__(self, other: Differences) -> Differences:
        """Both together, as if read at once."""
        count = self.count + other.count
        if not count:
            return self
        step = other.mean - self.mean
        return Differences(
            count,
            self.mean + step * other.count / count,
            self.squares + other.squares + step * step * self.count * other.count / count,
        )

    @property
    def deviation(self) -> float:
        """Standard deviation from sequence to sequence; infinite for fewer than two."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.inf

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / math.sqrt(max(self.count, 1))

    @property
    def doubt(self) -> float:
        """How often a candidate that is no better would look this good or better: one-sided p-value of the mean."""
        if self.count < 2:
            return 1.0
        if not self.error:
            return 0.0 if self.mean < 0 else 1.0
        return float(stdtr(self.count - 1, self.mean / self.error))


@dataclass(frozen=True, slots=True)
class Race:
    """When a candidate has won against the incumbent, and when it is given up.

    A candidate that is no better wins one look with probability ``level`` (normal differences; about that for others),
    a race of L looks, or the best of L candidates a look, at most L times as often.

    Attributes:
        level: doubt that is small enough; 0.16 is a mean of one standard error, where sequences are many.
    """

    level: float

    def won(self, found: Differences) -> bool:
        """One look: the candidate is better beyond the error."""
        return found.doubt <= self.level

    def hopeless(self, found: Differences, most: int) -> bool:
        """It is no better so far, or so little that ``most`` sequences like these would not tell; look at any time."""
        if found.mean >= 0:
            return True
        if found.count < 2 or most <= found.count:
            return most <= found.count
        needed = -float(stdtrit(most - 1, self.level)) * found.deviation / math.sqrt(most)
        return -found.mean < needed
