"""The parts of a plan: budget, problems, searchers, and what an ablation varies."""

from __future__ import annotations

import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from evo_hpo.search.budget import Budget

LONGEST_LABEL = 100
"""Characters of what names files, rows of tables and curves of pictures."""


def _numbers(value: object) -> object:
    for each in value if isinstance(value, list | tuple) else [value]:
        if isinstance(each, bool | str):  # pydantic takes true for 1 and "2" for 2
            raise ValueError(f"{each!r:.40} must be a number")
    return value


class Strict(BaseModel):
    """A part of a plan: unknown keys are refused, and what is no number where one is due."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    numbers = field_validator("seeds", "workers", "checkpoints", mode="before", check_fields=False)(_numbers)


def _label(value: str) -> str:
    if (value and not value.strip()) or {unicodedata.category(c) for c in value} & {"Cc", "Cs", "Zl", "Zp"}:
        raise ValueError(f"{value!r} is blank, or has line breaks or control characters: give a name of one line")
    return value


Label = Annotated[str, Field(max_length=LONGEST_LABEL), AfterValidator(_label)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class BudgetEntry(Budget):
    """What each search may spend, with the plan's own rules for keys and numbers."""

    numbers = field_validator("*", mode="before")(_numbers)


class NamedEntry(Strict):
    """Something registered, with its settings; ``label`` is what tables show."""

    name: str
    label: Label = ""
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def key(self) -> str:
        """Label, or else name."""
        return self.label or self.name


class ProblemEntry(NamedEntry):
    """A problem of the plan.

    ``instance = "seed"``: each seed of the plan draws an instance of its own, with that seed among its settings.
    """

    instance: Literal["seed"] | None = None

    def settings_of(self, seed: int) -> dict[str, Any]:
        """Settings of the problem that a search of this seed is on."""
        return {**self.settings, "seed": seed} if self.instance else self.settings


class SearcherEntry(NamedEntry):
    """A searcher of the plan; ``seeds`` replaces the plan's.

    ``each``: setting -> values; the entry stands for one searcher for every combination of them.
    """

    seeds: tuple[int, ...] | None = None
    each: dict[str, tuple[Any, ...]] | None = None


class VariantEntry(Strict):
    """Settings that change together in an ablation."""

    label: Label = ""
    settings: dict[str, Any]


class AblationEntry(Strict):
    """Which settings of which searcher of the plan to vary, one at a time or (``grid``) in every combination."""

    searcher: str
    vary: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    grid: bool = False
    variants: tuple[VariantEntry, ...] = ()
