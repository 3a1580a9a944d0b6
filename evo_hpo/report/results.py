"""Results of a comparison, loaded: searches on problems as values and DataFrames; partial results are fine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import pandas as pd

from evo_hpo.errors import UnknownNameError
from evo_hpo.record.comparison import Comparison, PlannedSearch, winner
from evo_hpo.record.fronts import judged
from evo_hpo.record.problem_record import ProblemRecord
from evo_hpo.record.records import SearchRecord
from evo_hpo.report.gaps import as_gaps, width_of
from evo_hpo.report.search_run import SearchRun
from evo_hpo.search.budget import KINDS


@dataclass(frozen=True)
class Results:
    """Searches on problems, ready for tables, statistics and figures.

    Attributes:
        name: of the plan.
        problems: what was searched, by key. Where each seed has an instance of its own, held-out losses here are gaps.
        runs: the searches that have a readable journal, finished or not.
        missing: id of a planned search without a readable journal (or without a measure of its gap) -> why.
        recorded: the comparison's folder with its plan and machine; one in memory has none.
    """

    name: str
    problems: Mapping[str, ProblemRecord]
    runs: tuple[SearchRun, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    recorded: Comparison = field(default_factory=lambda: Comparison(Path()))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads a comparison's folder: its record, and whatever its journals hold so far.

        Raises:
            PlanError: not the folder of a comparison.
        """
        recorded = Comparison.read(folder)
        found = list(recorded.journals())
        missing = {planned.id: held for planned, held in found if isinstance(held, str)}
        runs = [SearchRun.of(planned, held) for planned, held in found if isinstance(held, SearchRecord)]
        problems, runs, unmeasured = as_gaps(*judged(recorded.problems, runs))
        return cls(recorded.name, problems, tuple(runs), missing | unmeasured, recorded)

    # ------------------------------------------------------------------ selecting

    @property
    def labels(self) -> tuple[str, ...]:
        """Shown names of all searchers, in the order of the plan."""
        return tuple(dict.fromkeys(run.label for run in self.runs))

    @property
    def complete(self) -> bool:
        """True when every planned search has finished."""
        return not self.missing and all(run.finished for run in self.runs)

    def of(self, problem: str, label: str | None = None) -> tuple[SearchRun, ...]:
        """The searches on one problem, of one searcher where a label is given."""
        return tuple(r for r in self.runs if r.problem == problem and label in (None, r.label))

    def absent(self, problem: str, label: str | None = None) -> tuple[PlannedSearch, ...]:
        """The planned searches on one problem that are :attr:`missing`, of one searcher where a label is given."""
        planned = (s for s in self.recorded.searches if s.id in self.missing)
        return tuple(s for s in planned if s.problem == problem and label in (None, s.label))

    def uniform(self, problem: str, seed: int | None = None) -> SearchRun | None:
        """The search with uniform compression, if it has a finite held-out loss.

        One run stands for every seed, but where each has an instance of its own: there it is that of the seed's.
        """
        found = [r for r in self.of(problem) if r.searcher == "uniform" and math.isfinite(r.loss)]
        same = [r for r in found if r.seed == seed]
        others = [] if seed is not None and self.problems[problem].instances else found
        return next(iter([*same, *others]), None)

    def problem(self, key: str | None = None) -> ProblemRecord:
        """A problem by key; the first one without.

        Raises:
            UnknownNameError: no such problem.
        """
        key = next(iter(self.problems), "") if key is None else key
        if key not in self.problems:
            raise UnknownNameError(
                f"no problem {key!r} in this comparison; it has: {', '.join(self.problems) or 'none'}"
            )
        return self.problems[key]

    def seeds(self, problem: str) -> tuple[int, ...]:
        """Seeds of the searches on a problem; a deterministic searcher's only run counts for all of them."""
        runs = self.of(problem)
        return tuple(sorted({r.seed for r in runs if not r.deterministic} or {r.seed for r in runs}))

    def by_seed(self, problem: str, label: str) -> dict[int, SearchRun]:
        """Seed -> search; the one run of a deterministic searcher stands for every seed."""
        runs = self.of(problem, label)
        if runs and all(r.deterministic for r in runs):
            return dict.fromkeys(self.seeds(problem), runs[0])
        return {r.seed: r for r in runs}

    def repeated(self, problem: str, label: str) -> list[bool]:
        """For each of the :meth:`seeds`: whether its search is one that stands for an earlier seed already."""
        runs = self.of(problem, label)
        one = bool(runs) and all(r.deterministic for r in runs)
        return [one and place > 0 for place, _ in enumerate(self.seeds(problem))]

    def winner(self, problem: str, label: str | None = None) -> SearchRun | None:
        """The search that won on a problem so far, see :func:`evo_hpo.record.comparison.winner`; or of one searcher."""
        return winner(r for r in self.of(problem, label) if r.final is not None)

    def on(self, problem: str, text: str) -> Self:
        """The searches on one problem with the figures of one of its held-out texts in place of the first one's.

        So tables, curves and tests are drawn of any text as of the first; who won is decided on the first. Optima, and
        gaps where each seed has an instance of its own, are known on the first alone.

        Raises:
            UnknownNameError: no such problem, or no such text of it.
        """
        record = self.problem(problem)
        if text not in record.texts:
            raise UnknownNameError(
                f"no held-out text {text!r} of problem {problem!r}; it has: {', '.join(record.texts) or 'none by name'}"
            )
        if text == record.texts[0]:
            problems, runs = {problem: replace(record, texts=(text,))}, self.of(problem)
        else:
            reference = _figures_on(record.reference, text)
            unknown: dict[str, Any] = {"optimum": None, "optima": (), "instances": {}}
            problems = {problem: replace(record, texts=(text,), reference=reference, **unknown)}
            runs = tuple(
                replace(r, checkpoints=tuple(replace(c, held_out=_figures_on(c.held_out, text)) for c in r.checkpoints))
                for r in self.of(problem)
            )
        elsewhere = {s.id for s in self.recorded.searches if s.problem != problem}
        missing = {name: why for name, why in self.missing.items() if name not in elsewhere}
        return replace(self, problems=problems, runs=runs, missing=missing)

    # ------------------------------------------------------------------ frames

    def frame(self) -> pd.DataFrame:
        """One row a search: held-out figures at its end (or so far), and what it spent."""
        return pd.DataFrame([self._final_row(run) for run in self.runs])

    def _final_row(self, run: SearchRun) -> dict[str, Any]:
        space = self.problems[run.problem].space
        final = run.final
        return {
            **_identity(run),
            "finished": run.finished,
            "loss": run.loss,
            **({k: v for k, v in final.held_out.items() if k != "loss"} if final else {}),
            "average": space.average(final.levels) if final else float("nan"),
            "cost": space.cost(final.levels) if final else None,
            "tokens": run.tokens,
            "trials": run.evaluations,
            "failed": sum(o.status == "failed" for o in run.outcomes),
            "model_seconds": run.model_seconds,
            "searcher_seconds": run.searcher_seconds,
            "seconds": run.seconds,
            "stop_reason": run.stop_reason,
        }

    def checkpoints(self) -> pd.DataFrame:
        """One row a held-out checkpoint, in the order they were taken."""
        names = ("fraction", *KINDS)
        taken = [(run, c) for run in self.runs for c in run.checkpoints]
        return pd.DataFrame(
            [{**_identity(run), **{name: getattr(c, name) for name in names}, **c.held_out} for run, c in taken]
        )

    def trials(self) -> pd.DataFrame:
        """One row a trial, in the order they were scored; ``loss`` is the calibration loss on that minibatch."""
        return pd.DataFrame([row for run in self.runs for row in _trial_rows(run)])

    def pairs(self, *, value: str = "loss") -> pd.DataFrame:
        """Held-out result (lower is better) by (problem, seed) pair and searcher; finished searches only, else NaN.

        Args:
            value: ``loss``, or ``gap``: the loss in percent of the way from the best known loss (0) to uniform (100).
        """
        index, rows = [], []
        for key in self.problems:
            searches = {label: self.by_seed(key, label) for label in self.labels}
            for seed in self.seeds(key):
                runs = {label: found.get(seed) for label, found in searches.items()}
                index.append((key, seed))
                rows.append({k: r.loss if r is not None and r.finished else float("nan") for k, r in runs.items()})
        names = pd.MultiIndex.from_tuples(index, names=["problem", "seed"]) if index else None
        table = pd.DataFrame(rows, index=names, columns=list(self.labels), dtype=float)
        if value == "gap":
            for key in dict.fromkeys(k for k, _ in index):
                best, width = self.scale(key)
                table.loc[[key]] = 100 * (table.loc[[key]] - best) / width
        return table

    def scale(self, problem: str) -> tuple[float, float]:
        """(best, width): ``(loss - best) / width`` is 0 at the best known loss and 1 at uniform.

        Best known: the optimum where the problem names it, else the least held-out loss of any search. Without
        uniform, 1 is the worst checkpoint of any search. Losses that are not finite (failures) count for nothing here.
        """
        info = self.problems[problem]
        if info.instances:  # gaps already
            return 0.0, 100.0
        seen = [c.loss for r in self.of(problem) for c in r.checkpoints if math.isfinite(c.loss)]
        uniform = self.uniform(problem)
        best = info.optimum if info.optimum is not None else min(seen, default=0.0)
        top = uniform.loss if uniform is not None else max(seen, default=1.0)
        return best, width_of(best, top)

    def slack(self, problem: str) -> float:
        """How far above a target a loss may lie and still have reached it: the last digit."""
        best, width = self.scale(problem)
        return 1e-12 * max(abs(best), width)


def _figures_on(figures: Mapping[str, float], text: str) -> dict[str, float]:
    """Of held-out figures, those of one text after the first, without its name."""
    return {name.removeprefix(f"{text}/"): x for name, x in figures.items() if name.startswith(f"{text}/")}


def _identity(run: SearchRun) -> dict[str, Any]:
    return {"problem": run.problem, "searcher": run.label, "seed": run.seed, "id": run.id}


def _trial_rows(run: SearchRun) -> Iterable[dict[str, Any]]:
    for outcome, tokens in zip(run.outcomes, run.tokens_so_far(), strict=True):
        trial = outcome.trial
        yield {
            **_identity(run),
            "trial": trial.number,
            "generation": outcome.terms.generation,
            "stage": outcome.terms.stage,
            "parent": trial.parent,
            "loss": outcome.loss,
            "status": outcome.status,
            "tokens": outcome.tokens,
            "tokens_so_far": tokens,
            "seconds": outcome.seconds,
            "minibatch": outcome.minibatch,
            "levels": trial.levels,
            "note": trial.note,
        }
