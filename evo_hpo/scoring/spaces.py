"""The search space of a language model's levels, from the budgets that a plan gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evo_hpo.levels.level_set import LevelSet
from evo_hpo.scoring.file_size import FileSize
from evo_hpo.scoring.limits import Limits
from evo_hpo.space.compression_space import CompressionSpace
from evo_hpo.space.ranges import over

__all__ = ["budgeted"]


def budgeted(
    model: str, levels: LevelSet, average: Any, size: Any, drop: Mapping[str, int], limits: Limits
) -> CompressionSpace:
    """The settings are those of the task.

    Raises:
        InfeasibleError: a budget is outside what the levels allow, or no assignment keeps all of them.
        InvalidSettingError: as for sizes and limits.
    """

    def limited(found: CompressionSpace) -> CompressionSpace:
        return limits.applied(model, levels, found) if limits else found

    if drop:
        return levels.space(drop=drop)
    if size:
        file = FileSize.of(model, levels)
        return over(size, "size", lambda one: limited(file.space(levels, one)))
    if average is None:
        dearest = (max(c if isinstance(c, int) else c[0] for c in unit.costs) for unit in levels.units)
        return limited(levels.space(budget=sum(dearest)))
    return over(average, "average", lambda one: limited(levels.space(one)))
