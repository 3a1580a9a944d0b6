"""What is compressed as a whole, and the exact integer costs of its levels."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from evo_hpo.errors import InvalidSpaceError

LARGEST = 10**100


@dataclass(frozen=True)
class Unit:
    """One thing that is compressed as a whole.

    Args:
        name: unique name, for example ``model.layers.0.self_attn.q_proj``.
        costs: exact integer cost of each level, ascending; one tuple of integers a level where several resources are
            budgeted (ascending in the first).
        group: units of one group exchange level steps at equal cost; default: the units of the same size.
        levels: label of each level ("2", "3", "4" bits; "dropped", "kept"); default "0", "1", ...
        members: modules that share this unit's level. Tied modules are one unit with several members.
        size: number of weights; default 1.
        fixed: index of the only level that this unit may have.

    Raises:
        InvalidSpaceError: no levels, costs that are not ascending integers, or a mismatch of lengths.
    """

    name: str
    costs: tuple[int, ...] | tuple[tuple[int, ...], ...]
    group: str | None = None
    levels: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    size: int = 1
    fixed: int | None = None

    def __post_init__(self) -> None:
        costs = tuple(tuple(map(integer, c)) if isinstance(c, Sequence) else integer(c) for c in self.costs)
        object.__setattr__(self, "costs", costs)
        object.__setattr__(self, "levels", tuple(map(str, self.levels)) or tuple(map(str, range(len(costs)))))
        object.__setattr__(self, "members", tuple(self.members) or (self.name,))
        if not costs:
            raise InvalidSpaceError(f"unit {self.name!r} has no levels: give the cost of at least one")
        if len({len(c) if isinstance(c, tuple) else 0 for c in costs}) != 1:
            raise InvalidSpaceError(f"unit {self.name!r}: every level needs a cost for the same resources")
        first = [c[0] if isinstance(c, tuple) else c for c in costs]
        if any(c < 0 for c in first) or any(b < a for a, b in itertools.pairwise(first)):
            raise InvalidSpaceError(f"unit {self.name!r}: costs {first} must be >= 0 and ascending (sort the levels)")
        if len(self.levels) != len(costs):
            raise InvalidSpaceError(f"unit {self.name!r}: {len(self.levels)} level labels for {len(costs)} costs")
        if len(set(self.levels)) != len(costs):
            raise InvalidSpaceError(f"unit {self.name!r}: level labels {list(self.levels)} must differ from each other")
        object.__setattr__(self, "size", integer(self.size, "size"))
        if self.size < 1:
            raise InvalidSpaceError(f"unit {self.name!r}: size {self.size} must be >= 1")
        if self.fixed is not None:
            object.__setattr__(self, "fixed", integer(self.fixed, "level"))
        if self.fixed is not None and not 0 <= self.fixed < len(costs):
            raise InvalidSpaceError(f"unit {self.name!r}: fixed={self.fixed} must be in 0..{len(costs) - 1}")

    @property
    def role(self) -> str:
        """The unit's name without the block's number: ``self_attn.q_proj`` for ``model.layers.0.self_attn.q_proj``."""
        return re.split(r"(?:^|\.)\d+\.", self.name)[-1] if re.search(r"(?:^|\.)\d+\.", self.name) else "unit"

    @property
    def block(self) -> int | None:
        """Number of the decoder block in the unit's name, if it has one."""
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.name)
        return int(found.group(1)) if found else None


def integer(value: object, what: str = "cost") -> int:
    """``value`` as an int.

    Raises:
        InvalidSpaceError: it is not an integer, or above 1e100: ratios of costs and of their sums must fit a float.
    """
    try:
        found = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        hint = ": count bits or weights, never fractions" if what == "cost" else ""
        raise InvalidSpaceError(f"{what} {value!r} is not an integer{hint}") from None
    if abs(found) > LARGEST:
        raise InvalidSpaceError(f"{what} of {found.bit_length()} binary digits is out of range: give at most 1e100")
    return found
