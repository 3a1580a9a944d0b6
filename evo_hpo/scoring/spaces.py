"""The search space of a language model's levels, from the budgets that a plan gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from evo_hpo.errors import InfeasibleError, InvalidSettingError
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.scoring.file_size import FileSize
from evo_hpo.scoring.limits import Limits
from evo_hpo.space.compression_space import CompressionSpace
from evo_hpo.space.ranges import over


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
    return over(average, "average", lambda one: limited(_averaged(levels, one)))


def _averaged(levels: LevelSet, average: Any) -> CompressionSpace:
    """Of an average; an error tells those of the lowest, the highest and all uniform levels."""
    try:
        return levels.space(average)
    except InfeasibleError as error:
        if levels.resource not in ("bits", "storage"):
            raise
        size = sum(unit.size for unit in levels.units)
        told = ", ".join(f"{name} {cost / size:.4g}" for name, (_, cost) in levels.landmarks().items())
        raise InfeasibleError(f"average={average!r} is not what the levels allow ({error}): {told}") from error


def tied(levels: LevelSet, ties: Sequence[Sequence[str]]) -> LevelSet:
    """Levels of which modules that are called alike in each block, list by list, share one.

    Raises:
        InvalidSettingError: no unit is called so.
    """
    for names in ties:
        before, pattern = len(levels.units), "|".join(map(re.escape, names))
        levels = levels.tied({"+".join(names): rf"(.*)\.(?:{pattern})$"})
        if len(levels.units) == before:
            found = ", ".join(dict.fromkeys(unit.name.rpartition(".")[2] for unit in levels.units))
            raise InvalidSettingError(f"tie={list(names)} ties nothing: the units are called {found}")
    return levels
