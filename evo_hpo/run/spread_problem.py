"""A problem whose model lies elsewhere: the searcher and the journal are here, scoring is spread over scorers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from evo_hpo.scoring.rounds import COUNTED, Group, Rounds, Sums, counted, groups_of, scored
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.search.problem import Minibatch, Problem, Score
from evo_hpo.search.sensitivities import Form, Kind, Sensitivities
from evo_hpo.space.compression_space import Assignment

Call = tuple[str, tuple[Any, ...], dict[str, Any]]

TOLD = ("name", "space", "tokens", "pool_tokens", "optimum", "notes", "has_sensitivities", "reading", "texts", "optima")
REPORT: Call = ("report", (), {})


class Asked(Protocol):
    """Whoever answers for the problem, see :class:`evo_hpo.run.scorers.Scorers`."""

    def __len__(self) -> int: ...

    def ask(self, name: str, settings: dict[str, Any], questions: Sequence[Sequence[Call]]) -> list[list[Any]]: ...


class SpreadProblem(Problem):
    """Asks scorers what the problem of this name and settings would say.

    Trials, losses and charged tokens are bit for bit those of the problem itself: what is read next is decided here, by
    the rules that the evaluator follows, and answers are put together in the order of the questions.

    Args:
        scorers: who answers.
        name, settings: of the problem.
    """

    def __init__(self, scorers: Asked, name: str, settings: Mapping[str, Any]) -> None:
        self._scorers, self._made_by = scorers, (name, dict(settings))
        told = self._one(*((key, (), {}) for key in (*TOLD, "fingerprint", "reference")))
        for key, value in zip(TOLD, told[:-2], strict=True):
            setattr(self, key, value)
        self._fingerprint, self._reference = told[-2:]
        self._rounds = Rounds(self.reading.early_stopping if self.reading else False)
        self._counts = Counter(dict.fromkeys(COUNTED, 0))
        self.counted = COUNTED if self.reading else ()  # what one scorer counted says little

    def score(
        self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None
    ) -> Sequence[Score]:
        if self.reading is None:
            calls = [("score", (part, minibatch), {"keep": keep}) for part in _parts(assignments, len(self._scorers))]
            return [score for scores in self._each(calls) for score in scores]
        sequences = sequences_of(minibatch, self.reading.pool, self.reading.length)
        groups = groups_of(sequences, self.reading.group)
        found, todo, keep = self._rounds.known_of(assignments, minibatch.seed, groups, keep)
        self._counts["cached"] += len(found)
        if todo:
            sums, read = self._rounds.read(todo, groups, keep, self._read)
            new = [own for assignment, own in zip(todo, sums, strict=True) if assignment not in found]
            self._counts.update(counted(new, read, self.reading.length))
            found.update(zip(todo, sums, strict=True))
        return [scored(found[tuple(map(int, a))], self.reading.length) for a in assignments]

    def _read(self, todo: Sequence[Assignment], candidates: Sequence[int], groups: Sequence[Group], sums: Sums) -> None:
        """Candidates whose sums on a group are not known, spread over the scorers; neighbours share their blocks."""
        lacking: dict[tuple[int, ...], list[int]] = {}
        for i in sorted(candidates, key=todo.__getitem__):
            unread = tuple(n for n, (_, columns) in enumerate(groups) if np.isnan(sums[i, columns]).any())
            lacking.setdefault(unread, []).append(i)
        questions: list[tuple[list[int], list[Group]]] = []
        for numbers, alike in lacking.items():
            wanted, parts = [groups[n] for n in numbers], _parts(alike, len(self._scorers))
            # fewer candidates than scorers: their sequences are spread too
            slices = max(1, len(self._scorers) // len(parts)) if len(wanted) > 1 else 1
            questions += [(part, some) for part in parts for some in _parts(wanted, slices)]
        calls: list[list[Call]] = [
            [REPORT, ("read", ([todo[i] for i in part], [g[0] for g in some]), {}), REPORT] for part, some in questions
        ]
        answers = self._scorers.ask(*self._made_by, calls)
        for (part, some), (before, told, after) in zip(questions, answers, strict=True):
            sums[np.ix_(part, np.r_[tuple(columns for _, columns in some)])] = told
            self._counts["out_of_memory"] += after.get("out_of_memory", 0) - before.get("out_of_memory", 0)

    def sensitivities(
        self, assignment: Assignment | None, minibatch: Minibatch, *, kind: Kind = "sampled", form: Form = "inner"
    ) -> Sensitivities:
        found: Sensitivities = self._one(("sensitivities", (assignment, minibatch), {"kind": kind, "form": form}))[0]
        return found

    def validate(self, assignment: Assignment) -> dict[str, float]:
        return dict(self._one(("validate", (assignment,), {}))[0])

    def reference(self) -> dict[str, float]:
        return dict(self._reference)

    def check(self, tokens: int) -> None:
        self._one(("check", (tokens,), {}))

    def report(self) -> dict[str, Any]:
        counts = self._counts if self.reading else {}
        return {**self._one(REPORT)[0], **counts, "scorers": len(self._scorers)}

    def fingerprint(self) -> dict[str, Any]:
        return dict(self._fingerprint)

    def _one(self, *calls: Call) -> list[Any]:
        return self._scorers.ask(*self._made_by, [calls])[0]

    def _each(self, calls: Sequence[Call]) -> list[Any]:
        return [answers[0] for answers in self._scorers.ask(*self._made_by, [[call] for call in calls])]


def _parts(items: Sequence[Any], count: int) -> list[list[Any]]:
    """The items in at most ``count`` runs of nearly equal length, none empty."""
    count = max(1, min(count, len(items)))
    ends = [len(items) * i // count for i in range(count + 1)]
    return [list(items[a:b]) for a, b in itertools.pairwise(ends) if b > a]
