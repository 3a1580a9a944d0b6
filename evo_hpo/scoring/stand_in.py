"""A small space with a task's levels and budget, before anything is built: what cannot work there cannot work."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from evo_hpo.errors import InfeasibleError
from evo_hpo.space.compression_space import CompressionSpace, Unit
from evo_hpo.space.ranges import spanning


def unknown(*, ranged: bool = False, further: int = 0) -> CompressionSpace:
    """For levels whose costs are known once they are built; ``ranged``: over a range of budgets.

    Args:
        further: number of resources after the first.
    """
    costs = ((16, *[2] * further), (32, *[3] * further)) if further else (16, 32)
    units = [Unit(f"layers.{i}.unit", costs=costs, size=16) for i in range(30)]
    low, high = (CompressionSpace(units, (30 * b, *[30 * 3] * further) if further else 30 * b) for b in (20, 24))
    return spanning(low, high) if ranged else high


def stand_in(method: str, levels: Sequence[float], average: float, dropped: bool) -> CompressionSpace:
    """The settings are those of the task; without levels, a method has levels of its own.

    Raises:
        InfeasibleError: the average is outside what the levels allow.
    """
    if method in ("sparsegpt", "magnitude", "wanda") and not 0 <= average <= 1:
        raise InfeasibleError(f"average={average} of {method} must be a sparsity, from 0 to 1")
    if not levels and method != "drop":
        return unknown()
    if method in ("gptq", "rtn"):
        ordered = sorted(levels)
        low, high = 0 if dropped else ordered[0], ordered[-1]
        if not low <= average <= high:
            raise InfeasibleError(
                f"average={average} bits is outside what levels {list(ordered)} allow, {low} to {high}:"
                " change the average or the levels"
            )
        units = [
            Unit(
                f"layers.{i}.unit",
                costs=tuple(int(b) * 16 for b in (*[0] * dropped, *ordered)),
                levels=tuple(map(str, (*["dropped"] * dropped, *ordered))),
                size=16,
            )
            for i in range(30)
        ]
        return CompressionSpace.from_average(units, average)
    if method in ("sparsegpt", "magnitude", "wanda"):
        if not min(levels) <= average <= (1 if dropped else max(levels)):
            raise InfeasibleError(
                f"average={average} sparsity is outside what levels {sorted(levels)} allow:"
                " change the average or the levels"
            )
        kept = sorted(round(1000 * (1 - s)) for s in (*levels, *[1] * dropped))
        units = [Unit(f"layers.{i}.unit", costs=tuple(kept), size=1000) for i in range(30)]
        return CompressionSpace(units, int(30 * 1000 * (1 - Fraction(str(average)))))
    units = [Unit(f"layers.{i}.unit", costs=(0, 1), levels=("dropped", "kept")) for i in range(30)]
    return CompressionSpace(units, 30 - max(1, min(29, int(average))))
