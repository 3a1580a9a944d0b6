"""A comparison's folder: what was planned, what was found, who won. Its one reader and its one writer.

<root>/<name>/plan.toml          what was asked
              comparison.json    plan, problems, searches, machine, versions
              journals/*.jsonl   the record, one file a search
              profiles/*.json    the recommended assignment of each search; winner.json
              fronts/*.json,csv  over a range of budgets, the front of each search; winner.json, winner.csv
              report/            tables and pictures
              errors.log         traces of searches that failed
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from evo_hpo.errors import JournalError, PlanError
from evo_hpo.files import write_whole
from evo_hpo.record.changes import changes, told
from evo_hpo.record.environment import environment
from evo_hpo.record.fronts import front_files, judged
from evo_hpo.record.planned import PlannedSearch, disambiguate, distinct, planned
from evo_hpo.record.problem_record import ProblemRecord
from evo_hpo.record.records import SearchRecord, read_journal
from evo_hpo.search.checkpoint import FrontPoint
from evo_hpo.space.spending import spent

__all__ = ["ERRORS", "Comparison", "PlannedSearch", "disambiguate", "distinct", "winner"]

RECORD, PLAN, ERRORS = "comparison.json", "plan.toml", "errors.log"
CHANGES_NO_RESULT = ("workers", "description")
"""Keys of a plan that may differ when its comparison is resumed."""


class Contender(Protocol):
    """What a winner is chosen by."""

    @property
    def label(self) -> str:
        """Shown name of the searcher."""

    @property
    def loss(self) -> float:
        """Held-out loss; lower is better, inf where there is none."""


R = TypeVar("R", bound=Contender)


def winner(results: Iterable[R]) -> R | None:
    """Who won on one problem; None without results. The definition for profiles, report and MLflow.

    The least held-out loss; among equals, of the searcher with the least median; among these, the first in the order
    given (the plan's). Losses of different problems cannot be compared: give those of one.
    """
    found = list(results)
    losses: dict[str, list[float]] = {}
    for result in found:
        losses.setdefault(result.label, []).append(result.loss)
    return min(found, key=lambda r: (r.loss, statistics.median(losses[r.label])), default=None)


@dataclass(frozen=True)
class Comparison:
    """What a comparison's folder holds. The journals are not in it: :meth:`journals` reads them.

    Attributes:
        folder: where it lies.
        name: of the plan, and of the folder.
        plan: what was asked, as plain data.
        problems: what was searched, by key; a problem is there once it was made.
        searches: in the plan's order.
        choices: key of a problem -> settings that were settled, for all who make it (the dtype for ``auto``).
        created: seconds since the epoch (text in old folders).
        versions, git, machine: what it ran on.
    """

    folder: Path
    name: str = ""
    plan: Mapping[str, Any] = field(default_factory=dict)
    problems: Mapping[str, ProblemRecord] = field(default_factory=dict)
    searches: tuple[PlannedSearch, ...] = ()
    choices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    created: float | str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    git: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def lies_in(folder: Path) -> bool:
        """True for the folder of a comparison."""
        return (folder / RECORD).is_file()

    @classmethod
    def read(cls, folder: Path | str) -> Comparison:
        """The comparison in a folder, of this version or an older one.

        Raises:
            PlanError: not the folder of a comparison, or its record is damaged.
        """
        folder = Path(folder)
        if not cls.lies_in(folder):
            raise PlanError(f"{folder} is not a comparison's folder: it has no {RECORD}")
        try:
            return cls._of(folder, json.loads((folder / RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{folder / RECORD} cannot be read ({error!r}): give the folder of a comparison") from None

    @classmethod
    def _of(cls, folder: Path, data: Mapping[str, Any]) -> Comparison:
        machine = data.get("machine") or {}
        return cls(
            folder,
            data.get("name") or folder.name,
            data.get("plan") or {},
            {key: ProblemRecord.from_json(key, entry) for key, entry in (data.get("problems") or {}).items()},
            planned(data.get("searches") or []),
            data.get("choices") or {},
            data.get("created") or "",
            data.get("versions") or {},
            data.get("git") or {},
            machine if isinstance(machine, dict) else {"machine": machine},
        )

    @classmethod
    def start(
        cls, folder: Path, plan: Mapping[str, Any], searches: Sequence[PlannedSearch], text: str | None = None
    ) -> Comparison:
        """Writes the record of a comparison that begins or goes on; problems and choices that it knows already stay.

        ``text`` is that of the plan's file, where there is one.
        """
        (folder / "journals").mkdir(parents=True, exist_ok=True)
        known = cls.read(folder) if cls.lies_in(folder) else cls(folder)
        held = known.problems, tuple(searches), known.choices
        comparison = cls(folder, folder.name, plan, *held, time.time(), **environment())
        comparison._write()
        if text is not None:
            write_whole(folder / PLAN, text)
        return comparison

    def with_problem(self, problem: ProblemRecord) -> Comparison:
        """The comparison with a problem that was made, written.

        Raises:
            JournalError: it is not the one that the comparison started with: figures would not be comparable.
        """
        if problem.key in self.problems:
            problem = self.problems[problem.key].joined(problem)
        comparison = replace(self, problems={**self.problems, problem.key: problem})
        comparison._write()
        return comparison

    def with_choices(self, choices: Mapping[str, Mapping[str, Any]]) -> Comparison:
        """The comparison with what was measured for its problems, written."""
        comparison = replace(self, choices=choices)
        comparison._write()
        return comparison

    def refuse_other_plan(self, plan: Mapping[str, Any]) -> None:
        """Raises JournalError where a plan differs from the one that was started in what changes a result."""
        if changed := changes(self.plan, plan, CHANGES_NO_RESULT):
            raise JournalError(
                f"{self.folder} was started with another plan ({told(changed)}): restore it, or start anew"
            )

    @property
    def started(self) -> str:
        """When it was created, readable, in UTC."""
        if isinstance(self.created, str):
            return self.created
        return datetime.fromtimestamp(self.created, UTC).strftime("%Y-%m-%d %H:%M UTC")

    @property
    def plan_text(self) -> str:
        """The plan as its file says it; without a file, its data as JSON."""
        path = self.folder / PLAN
        return path.read_text(encoding="utf-8") if path.is_file() else json.dumps(dict(self.plan), indent=1)

    def documents(self) -> tuple[list[Path], list[Path]]:
        """Files, and folders of files, that a copy of the comparison takes beside its journals."""
        files = [self.folder / name for name in (PLAN, RECORD, ERRORS)]
        folders = [self.folder / name for name in ("report", "profiles", "fronts")]
        return [f for f in files if f.is_file()], [f for f in folders if f.is_dir()]

    def sensitivities_picture(self, search: str) -> Path:
        """Where the report draws what a search measured of its units."""
        return self.folder / "report" / "sensitivities" / f"{search}.png"

    def note_failure(self, search: str, trace: str) -> None:
        """Keeps the trace of a search that failed, where it has one, for its reader."""
        if trace:
            with (self.folder / ERRORS).open("a", encoding="utf-8") as log:
                log.write(f"{search}\n{trace}\n")

    def _write(self) -> None:
        data = {
            "name": self.name,
            "plan": self.plan,
            "problems": {key: problem.to_json() for key, problem in self.problems.items()},
            "searches": [asdict(search) for search in self.searches],
            "choices": self.choices,
            **{name: getattr(self, name) for name in ("created", "versions", "git", "machine")},
        }
        write_whole(self.folder / RECORD, json.dumps(data, indent=1))

    # ------------------------------------------------------------------ what was found

    def journals(self) -> Iterator[tuple[PlannedSearch, SearchRecord | str]]:
        """Every planned search, and what its journal holds so far, or why there is none (not started, damaged)."""
        for search in self.searches:
            path = self.folder / search.journal
            if search.problem not in self.problems or not path.exists():
                yield search, "not started"
                continue
            try:
                yield search, read_journal(path)
            except JournalError as error:
                yield search, str(error)

    def records(self) -> list[SearchRecord]:
        """The searches that have a readable journal, in the plan's order."""
        return [found for _, found in self.journals() if isinstance(found, SearchRecord)]

    def write_profiles(self) -> None:
        """Writes ``profiles/<search>.json`` for each search with held-out figures, and each problem's winner.

        The winner's is ``winner.json``, or with several problems in the plan ``winner-<problem>.json``; a problem with
        an instance for each seed has none.
        """
        target = self.folder / "profiles"
        results: dict[str, list[SearchRecord]] = {}
        texts: dict[str, str] = {}
        for search, found in self.journals():
            if isinstance(found, SearchRecord) and found.checkpoints:
                if not self.problems[search.problem].instances:
                    results.setdefault(search.problem, []).append(found)
                texts[found.search] = json.dumps(self.profile(search, found), indent=1)
                target.mkdir(exist_ok=True)
                write_whole(target / f"{search.id}.json", texts[found.search])
        names = distinct({key: f"winner-{key.replace('/', '-')}" for key in self.problems})
        for key, found_on in results.items():
            name = "winner" if len(self.plan["problems"]) == 1 else names[key]
            if best := winner(judged({key: self.problems[key]}, found_on)[1]):
                write_whole(target / f"{name}.json", texts[best.search])
                for path, text in front_files(self.problems[key], found_on, best.search, name):
                    (self.folder / "fronts").mkdir(exist_ok=True)
                    write_whole(self.folder / "fronts" / path, text)

    def profile(self, search: PlannedSearch, found: SearchRecord, point: FrontPoint | None = None) -> dict[str, Any]:
        """What a search recommends, or a point of its front, as a profile's file has it."""
        final, problem = point or found.checkpoints[-1], self.problems[search.problem]
        entry = {k: v for p in self.plan["problems"] if _key(p) == search.problem for k, v in p.items()}
        if entry.pop("instance", None):
            entry["settings"] = {**entry.get("settings", {}), "seed": search.seed}
        return {
            "search": search.id,
            "searcher": search.searcher,
            "settings": search.settings,
            "seed": search.seed,
            "problem": entry,
            "fingerprint": found.header["fingerprint"],
            "held_out": dict(final.held_out),
            "cost": problem.space.cost(final.levels),
            "average": problem.space.average(final.levels),
            **({"costs": spent(problem.space, final.levels)} if len(problem.space.budgets) > 1 else {}),
            "levels": list(final.levels),
            "units": problem.space.labels(final.levels),
        }

    def winner_files(self) -> list[Path]:
        """The profiles of the winners that were written."""
        return sorted((self.folder / "profiles").glob("winner*.json"))

    def winning_profiles(self) -> dict[str, dict[str, Any]]:
        """Key of a problem -> profile of its winner, as written."""
        found: dict[str, dict[str, Any]] = {}
        for path in self.winner_files():
            with contextlib.suppress(ValueError):  # damaged
                profile = json.loads(path.read_text(encoding="utf-8"))
                found[_key(profile.get("problem") or {})] = profile
        return found


def _key(problem: Mapping[str, Any]) -> str:
    """The key of a plan's problem: its label, or else its name."""
    return str(problem.get("label") or problem.get("name") or "")
