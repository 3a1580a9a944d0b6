"""Sizes and times as people write them: "24 GB", "400 MiB", "3.4 bits a weight", "12 ms", "80 tokens/s"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from evo_hpo.errors import InvalidSettingError

UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
A_WEIGHT = {"bits a weight": Fraction(1, 8), "bytes a weight": Fraction(1)}


@dataclass(frozen=True)
class Amount:
    """A number of bytes, or of bytes a weight.

    Attributes:
        bytes: exact.
        a_weight: for each weight instead of in all.
    """

    bytes: Fraction
    a_weight: bool = False

    @classmethod
    def of(cls, text: str, what: str = "size", *, relative: bool = True) -> Amount:
        """What a text says.

        Args:
            what: name of the setting, for messages.
            relative: bits or bytes a weight are allowed.

        Raises:
            InvalidSettingError: it says nothing, or nothing above 0.
        """
        found = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([a-z]+(?: a weight)?)\s*", text, re.IGNORECASE)
        unit = found[2].lower() if found else ""
        if not found or not float(found[1]) or not (unit in UNITS or (relative and unit in A_WEIGHT)):
            also = ", '3.4 bits a weight' or '0.42 bytes a weight'" if relative else " or '80 GiB'"
            raise InvalidSettingError(
                f"{what}={text[:60]!r} must be a size above 0 with its unit, such as '24 GB'{also}"
            )
        number = Fraction(found[1])
        return cls(number * UNITS[unit]) if unit in UNITS else cls(number * A_WEIGHT[unit], a_weight=True)

    def total(self, weights: int) -> int:
        """Whole bytes for so many weights."""
        return int(self.bytes * weights if self.a_weight else self.bytes)


def shown(size: int) -> str:
    """Bytes in MB or GB (powers of ten), to four digits."""
    return f"{size / 1e9:.4g} GB" if size >= 1e9 else f"{size / 1e6:.4g} MB"


TIMES = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9}


def nanoseconds(text: str, what: str = "latency") -> int:
    """Of a token: "12 ms" (also s, us, ns), or "80 tokens/s"; rounded down.

    Raises:
        InvalidSettingError: it says nothing, or nothing above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ns|us|µs|ms|s|tokens/s)\s*", str(text))
    if not found or not float(found[1]):
        raise InvalidSettingError(
            f"{what}={text!r} must be a time above 0 with its unit, such as '12 ms', or '80 tokens/s'"
        )
    number = Fraction(found[1])
    return int(10**9 / number if found[2] == "tokens/s" else number * TIMES[found[2]])


def milliseconds(time: int) -> str:
    """Nanoseconds in milliseconds, to four digits."""
    return f"{time / 1e6:.4g} ms"
