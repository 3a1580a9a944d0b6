"""What a comparison runs: problems x searchers x seeds on one budget."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from evo_hpo.errors import EvoHpoError, PlanError
from evo_hpo.record.comparison import PlannedSearch
from evo_hpo.run.ablation import expand, written_out
from evo_hpo.run.entries import (
    LONGEST_LABEL,
    AblationEntry,
    BudgetEntry,
    ProblemEntry,
    SearcherEntry,
    Strict,
    VariantEntry,
)
from evo_hpo.search.registry import describe_problem, make_searcher, searcher_class
from evo_hpo.search.searcher import check_settings
from evo_hpo.space.compression_space import CompressionSpace, Unit

SAFE_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
LONGEST_FILE = 200  # characters of a journal's name: file systems take 255
MOST_SEEDS = 10_000


class Plan(Strict):
    """A comparison.

    Attributes:
        name: of the comparison's folder and its experiment.
        description: shown in the report.
        seeds: of the searchers that are random; the minibatches of a seed are the same for every searcher.
        budget: of each search.
        checkpoints: fractions of the budget at which the incumbent is validated on held-out data.
        workers: processes that run searches at the same time; 0: one a core, or where a GPU
            scores one in all. Results do not depend on it.
        problems, searchers: the grid.
        ablation: variants of one of the searchers, added to the grid.
    """

    name: str
    description: str = ""
    seeds: tuple[int, ...] = (0,)
    budget: BudgetEntry
    checkpoints: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    workers: int = Field(default=0, ge=0)
    problems: tuple[ProblemEntry, ...] = Field(min_length=1)
    searchers: tuple[SearcherEntry, ...] = Field(min_length=1)
    ablation: AblationEntry | None = None

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if len(value) > LONGEST_LABEL:
            raise ValueError(f"{len(value)} characters: give at most {LONGEST_LABEL}, it names a folder")
        if not value or SAFE_NAME.search(value) or value.startswith("."):
            raise ValueError(f"{value!r} must be letters, digits, dots, dashes and underscores: it names a folder")
        return value

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            if not 1 <= value <= MOST_SEEDS:
                raise ValueError(f"{value} must be a number of seeds from 1 to {MOST_SEEDS}, or a list of seeds")
            return tuple(range(value))
        return value

    @field_validator("checkpoints")
    @classmethod
    def _checkpoints(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < f <= 1 for f in value):
            raise ValueError(f"{list(value)} must be fractions of the budget, above 0 and at most 1")
        return tuple(sorted({*value, 1.0}))

    @field_validator("searchers")
    @classmethod
    def _searchers(cls, value: tuple[SearcherEntry, ...]) -> tuple[SearcherEntry, ...]:
        return written_out(value)

    @model_validator(mode="after")
    def _grid(self) -> Plan:
        for place, seeds in [("seeds", self.seeds), *((f"searcher {s.key!r}: seeds", s.seeds) for s in self.searchers)]:
            if seeds is None:
                continue
            if not seeds:
                raise ValueError(f"{place}: give at least one")
            if min(seeds) < 0:
                raise ValueError(f"{place}: {min(seeds)} must be 0 or more")
            if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
                raise ValueError(
                    f"{place}: {twice[0]} stands there twice, and would be the same search: give each once"
                )
        for what, keys in (("problem", [p.key for p in self.problems]), ("searcher", [s.key for s in self.searchers])):
            for key in keys:
                if keys.count(key) > 1:
                    raise ValueError(f"two {what}s are called {key!r}: give each a label of its own")
        return self

    def with_uniform(self) -> Plan:
        """The plan with uniform compression among its searchers: what everything is measured against."""
        if any(entry.name == "uniform" for entry in self.searchers):
            return self
        return self.model_copy(update={"searchers": (*self.searchers, SearcherEntry(name="uniform"))})

    def planned(self) -> Iterator[PlannedSearch]:
        """Every search, seeds outermost so that partial results already compare all searchers.

        A searcher whose seed changes nothing runs once on each instance of a problem.
        """
        seen = set()
        longest = max([self.seeds, *(s.seeds for s in self.searchers if s.seeds)], key=len)
        for position in range(len(longest)):
            for problem in self.problems:
                for entry in self.searchers:
                    fixed = not (searcher_class(entry.name).random or problem.instance)
                    seeds = (entry.seeds or self.seeds)[: 1 if fixed else None]
                    if position >= len(seeds):
                        continue
                    seed = seeds[position]
                    parts = [problem.key] if len(self.problems) > 1 else []
                    name = SAFE_NAME.sub("-", "-".join([*parts, entry.key, f"s{seed}"]))
                    if len(name) > LONGEST_FILE:
                        name = f"{name[:LONGEST_FILE]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
                    while name in seen:
                        name += "x"
                    seen.add(name)
                    what = (problem.key, entry.name, entry.key, entry.settings)
                    yield PlannedSearch(name, *what, seed, f"journals/{name}.jsonl", fixed)

    def plain(self) -> dict[str, Any]:
        """As plain data, settings that are not given left out."""
        data: dict[str, Any] = json.loads(self.model_dump_json(exclude_none=True))
        return data

    def check(self) -> None:
        """Refuses names and settings that are wrong, before any work.

        Raises:
            EvoHpoError: the first fault, with the place in the plan.
        """
        stand_in = CompressionSpace(
            [Unit(name=f"layers.{i}.unit", costs=(2, 3, 4), levels=("2", "3", "4")) for i in range(8)], budget=24
        )
        for entry in self.searchers:
            with _at(f"searcher {entry.key!r}"):
                make_searcher(entry.name, stand_in, seed=0, **entry.settings)
        for problem in self.problems:
            with _at(f"problem {problem.key!r}"):
                known = describe_problem(problem.name).settings
                check_settings(f"problem {problem.name!r}", known, problem.settings)
                if problem.instance and ("seed" in problem.settings or "seed" not in known):
                    raise PlanError("instance = 'seed' is for problems with a setting 'seed', and gives its values")


PARTS = {
    "budget": BudgetEntry,
    "problems": ProblemEntry,
    "searchers": SearcherEntry,
    "ablation": AblationEntry,
    "variants": VariantEntry,
}


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Prefixes the place to any error of ours raised inside that does not name it itself."""
    try:
        yield
    except EvoHpoError as error:
        message = str(error)
        raise PlanError(message if message.startswith(f"unknown {place};") else f"{place}: {message}") from error


def _near(key: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def make_plan(data: dict[str, Any], source: str = "plan") -> Plan:
    """A plan from plain data.

    Raises:
        PlanError: unknown keys or values out of range, in one line.
    """
    try:
        plan = Plan.model_validate(data)
        if plan.ablation is None:
            return plan
        return plan.model_copy(update={"searchers": expand(plan.searchers, plan.ablation), "ablation": None})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"]) or "plan"
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = _fields_at(first["loc"])
            near = _near(str(first["loc"][-1]), dict.fromkeys(known))
            raise PlanError(f"{source}: unknown key {place!r}{near}; allowed here: {', '.join(known)}") from None
        message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
        message = re.sub("(valid )?dictionary", "table", message.replace("valid tuple", "list"))
        raise PlanError(f"{source}: {place}: {message}") from None
    except EvoHpoError as error:
        raise PlanError(f"{source}: {error}") from None


def _fields_at(place: tuple[int | str, ...]) -> list[str]:
    model: type = Plan
    for part in place[:-1]:
        model = PARTS.get(str(part), model)
    return list(inspect.signature(model).parameters)
