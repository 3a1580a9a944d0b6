"""Further stores whose levels a task offers beside its own: folders, or recipes of what is to be built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from evo_hpo.errors import InvalidSettingError
from evo_hpo.models.corpora import Spec, shares_of
from evo_hpo.search.searcher import check_settings
from evo_hpo.search.setting_types import annotations_of, check_types

T = TypeVar("T", bound=Any)  # a task of a language model

RECIPE: dict[str, Any] = {"method": "", "levels": (), "build": {}, "store": ""}


def beside(task: T) -> list[T]:
    """For each store to join, in order, the task whose own store it is, on the same model and text.

    Raises:
        UnknownNameError: a recipe has a setting that recipes do not have.
        InvalidSettingError: one of a wrong type; or its method makes no levels of weights.
    """
    budgets: dict[str, Any] = {"average": None, "size": "", "latency": "", "latency_table": "", "parts": {}}
    found = []
    for one in task.join:
        given: dict[str, Any] = {"store": one} if isinstance(one, str) else {**RECIPE, **one}
        check_settings("join", RECIPE, given)
        check_types("join", annotations_of(type(task)), given)
        if not one or given.get("method") in ("", "drop"):
            raise InvalidSettingError(
                f"join={one} must name a method of levels of weights; for dropped ones set dropped = true, and tie for"
                " whole modules"
            )
        found.append(replace(task, **given, **budgets, resource="", arithmetic="", tie=(), join=(), dropped=False))
    return found


def read_by(tasks: Sequence[Any]) -> tuple[Spec, int]:
    """All texts that the stores of these tasks are calibrated on, and the most tokens that one reads of them."""
    built = [task.build_settings for task in tasks]
    names = [name for each in built for name in shares_of(each["calibration"])]
    return dict.fromkeys(names, 1), max(each.get("calibration_tokens", 0) for each in built)
