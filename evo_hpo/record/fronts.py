"""Fronts of searches over a range of budgets: how they are judged, and as files.

A front is judged by its hypervolume: the area between it and one reference point, the same for all searches on a
problem: the budget of the range, and the held-out loss of uniform compression where it loses most. That area, as a
share of the range's width and taken from the reference loss, is the mean loss over all budgets of the range, which is
what tables and tests show: lower is better. Losses of a language model (KL) differ by orders of magnitude over a range;
there the area is one of logarithms, and the mean is geometric.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

import moocore
import numpy as np

from evo_hpo.record.lines import encode_point
from evo_hpo.record.problem_record import ProblemRecord
from evo_hpo.search.checkpoint import Checkpoint, FrontPoint
from evo_hpo.space.ranges import foot, marks

LEAST = 1e-12
"""Nats a token that count as such on a scale of logarithms: no loss at all has none."""

Points = Sequence[tuple[int, float]]
"""Cost and loss."""


class Searched(Protocol):
    """A search with its checkpoints: a journal's record, or what the report keeps of it."""

    @property
    def searcher(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def problem(self) -> str: ...
    @property
    def checkpoints(self) -> Sequence[Checkpoint]: ...


S = TypeVar("S", bound=Searched)


@dataclass(frozen=True)
class Measure:
    """What fronts of one problem are held against, on one held-out text.

    Attributes:
        foot, budget: ends of the range, in cost of the first resource.
        loss: of the reference point.
        geometric: losses are compared on a scale of logarithms.
    """

    foot: int
    budget: int
    loss: float
    geometric: bool

    def hypervolume(self, points: Points) -> float:
        """Area between a front and the reference point; the range is 1 wide. More is better."""
        width = max(self.budget - self.foot, 1)
        known = [(max(0, c - self.foot) / width, self._scaled(x)) for c, x in points if math.isfinite(x)]
        reference = [1.0, self._scaled(self.loss)]
        below = [point for point in known if point[0] <= 1 and point[1] < reference[1]]
        return float(moocore.hypervolume(np.array(below), ref=reference)) if below else 0.0

    def mean(self, points: Points) -> float:
        """Mean loss over all budgets of the range, the reference's where the front has nothing; lower is better."""
        area = self._scaled(self.loss) - self.hypervolume(points)
        return math.exp(area) if self.geometric else area

    def _scaled(self, loss: float) -> float:
        return math.log(max(loss, LEAST)) if self.geometric else loss


def loss_keys(problem: ProblemRecord) -> list[str]:
    """What the losses on each held-out text are called among held-out figures."""
    return ["loss", *(f"{text}/loss" for text in problem.texts[1:])]


def measures(problem: ProblemRecord, searches: Sequence[Searched]) -> dict[str, Measure]:
    """One for each held-out text. The reference loss is the most that any point of uniform compression's front loses.

    Where uniform compression has no front, the most that any search's has.
    """
    last = [s for s in searches if s.checkpoints and s.checkpoints[-1].front]
    base = [s for s in last if s.searcher == "uniform"] or last
    found = {}
    for key in loss_keys(problem):
        losses = [p.held_out.get(key, math.nan) for s in base for p in s.checkpoints[-1].front]
        worst = max(filter(math.isfinite, losses), default=1.0)
        found[key] = Measure(foot(problem.space), problem.space.budget, worst, problem.is_language_model)
    return found


def points_of(front: Sequence[FrontPoint], key: str) -> Points:
    """Costs and held-out losses."""
    return [(p.cost, p.held_out.get(key, math.nan)) for p in front]


def judged(problems: Mapping[str, ProblemRecord], searches: Sequence[S]) -> tuple[dict[str, ProblemRecord], list[S]]:
    """Problems and searches with the loss over the range in place of the loss at one budget; others stay as they are.

    So who wins, tables, curves and tests work on fronts as on single assignments.
    """
    shown, found = dict(problems), list(searches)
    for key, problem in problems.items():
        if not problem.space.ranged:
            continue
        own = [s for s in searches if s.problem == key]
        groups = {s.seed if problem.instances else None for s in own}
        optima = {}
        for seed in groups:
            members = [s for s in own if seed is None or s.seed == seed]
            scale = measures(problem, members)
            kept = problem.instances[str(seed)] if problem.instances else {"optima": problem.optima}
            optima[str(seed)] = _optimum(problem, scale["loss"], kept.get("optima") or ())
            for place, search in enumerate(searches):
                if any(search is member for member in members):
                    taken = [_judged(c, scale) for c in search.checkpoints]
                    found[place] = replace(search, checkpoints=tuple(taken))  # type: ignore[type-var]
        instances = {s: {**of, "optimum": optima.get(s)} for s, of in problem.instances.items()}
        shown[key] = replace(problem, optimum=None if instances else optima.get("None"), instances=instances)
    return shown, found


def _judged(checkpoint: Checkpoint, scale: Mapping[str, Measure]) -> Checkpoint:
    figures = {key: measure.mean(points_of(checkpoint.front, key)) for key, measure in scale.items()}
    gaps = {key.replace("/loss", "/gap"): x - figures["loss"] for key, x in figures.items() if key != "loss"}
    return replace(checkpoint, held_out=figures | gaps)


def _optimum(problem: ProblemRecord, measure: Measure, optima: Sequence[Sequence[float]]) -> float | None:
    """The mean loss of the best front at the marks of the range, where it is known."""
    within = ([(int(c), x) for c, x in optima if c <= mark] for mark in marks(problem.space))
    taken = [fitting[-1] for fitting in within if fitting]
    return measure.mean(taken) if taken else None


def picked(front: Sequence[FrontPoint], budget: float) -> FrontPoint | None:
    """What a front gives at a budget: its dearest point that fits; None: nothing fits."""
    return max((p for p in front if p.cost <= budget), key=lambda p: p.cost, default=None)


# ---------------------------------------------------------------------- files


def front_files(problem: ProblemRecord, searches: Sequence[Any], winner: str, name: str) -> Iterator[tuple[str, str]]:
    """File name and text of each search's front as JSON and CSV, and of the winner's under its name."""
    scale = measures(problem, searches)
    for search in searches:
        front = search.checkpoints[-1].front
        if not front:
            continue
        data = {
            "search": search.search,
            "searcher": search.searcher,
            "label": search.label,
            "seed": search.seed,
            "problem": problem.key,
            "resource": problem.space.resources[0],
            "reference": {key: asdict(measure) for key, measure in scale.items()},
            "hypervolume": {key: m.hypervolume(points_of(front, key)) for key, m in scale.items()},
            "mean loss": {key: m.mean(points_of(front, key)) for key, m in scale.items()},
            "points": [{"average": problem.space.average(p.levels), **encode_point(p)} for p in front],
        }
        for stem in (search.search, *([name] if search.search == winner else [])):
            yield f"{stem}.json", json.dumps(data, indent=1)
            yield f"{stem}.csv", _table(problem, front)


def _table(problem: ProblemRecord, front: Sequence[FrontPoint]) -> str:
    text = io.StringIO()
    names = list(front[0].held_out)
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["cost", "average", "calibration loss", *(f"held-out {name}" for name in names), "levels"])
    for point in front:
        figures = [point.held_out.get(name) for name in names]
        levels = " ".join(map(str, point.levels))
        rows.writerow([point.cost, problem.space.average(point.levels), point.loss, *figures, levels])
    return text.getvalue()
