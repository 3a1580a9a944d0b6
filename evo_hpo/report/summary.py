"""Who is ahead, by how much, and how sure that is: all statistics of one problem, or over all problems together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from evo_hpo.report.curves import SpeedUp, area, axes, curve, expected_running_time, speed_up
from evo_hpo.report.results import Results
from evo_hpo.report.statistics import (
    Interval,
    PairedTest,
    average_ranks,
    cliques,
    compare_pairs,
    critical_difference,
    friedman,
    interquartile_mean,
    pairs_needed,
    spread,
)
from evo_hpo.report.texts import elsewhere

GOALS = (50.0, 25.0, 10.0, 0.0)
"""Targets of expected running times: percent of the way from the best known loss (0) to uniform's (100)."""

MOST_NAMED = 8
"""Searchers that a verdict names one by one where it is the same for all."""


@dataclass(frozen=True)
class Standing:
    """One searcher in a summary. Lower is better for ``median``, ``iqm``, ``rank``, ``area`` and running times.

    Attributes:
        median, iqm: of the summary's value over (problem, seed) pairs; over several problems, of the problems on which
            every searcher finished one, where there are such.
        rank: average over the pairs that every searcher finished; NaN without any. Where no searcher draws anything, a
            problem is one pair, whatever its seeds.
        area: mean loss over the whole budget (area under the anytime curve), median over seeds; of one problem only, as
            running times and ``speed_up`` are, and where more than one checkpoint tells of the way.
        running_times: goal (see :data:`GOALS`) -> expected spending to reach it; inf: never reached.
        versus_best, versus_uniform: paired tests, each family Holm-corrected.
        speed_up: how much sooner the best searcher reaches this one's final loss.
    """

    label: str
    median: Interval
    iqm: Interval
    rank: float
    area: Interval | None
    running_times: dict[float, float]
    versus_best: PairedTest | None
    versus_uniform: PairedTest | None
    speed_up: SpeedUp | None


@dataclass(frozen=True)
class Summary:
    """Statistics over the pairs of some problems.

    Attributes:
        value: what is compared: the problem's loss, or the gap in percent where problems are put together.
        pairs: (problem, seed) pairs that every ranked searcher finished.
        standings: best first (by median, then rank).
        friedman: p that all searchers are alike; ``critical_difference``: of average ranks (Nemenyi, 5 %).
        cliques: groups of labels whose ranks differ by less than that.
        verdict: the result in words.
    """

    problems: tuple[str, ...]
    value: str
    axis: str
    pairs: int
    standings: tuple[Standing, ...]
    friedman: float
    critical_difference: float
    cliques: tuple[tuple[str, ...], ...]
    verdict: str

    @property
    def best(self) -> str:
        """Label of the searcher with the least median; empty when nothing has finished."""
        return self.standings[0].label if self.standings else ""

    def frame(self) -> pd.DataFrame:
        """One row a searcher, flat."""
        return pd.DataFrame([_flat(s) for s in self.standings])


def summarise(results: Results, problems: Sequence[str] | None = None) -> Summary:
    """Statistics over the finished searches on these problems (default: all).

    One problem is compared in its own loss. Several are put together as gaps: percent of the way from the best known
    loss of each problem (0) to uniform's (100).
    """
    keys = tuple(problems if problems is not None else results.problems)
    table = results.pairs(value="loss" if len(keys) == 1 else "gap")
    table = table[table.index.get_level_values("problem").isin(keys)] if len(table) else table
    table = table.dropna(axis="columns", how="all")
    columns = {label: table[label].to_numpy(dtype=np.float64) for label in table.columns}
    repeated = _repeated(results, table)
    common = _common(table)
    strata = [str(p) for p in common.index.get_level_values("problem")] if len(common) else []
    medians = {label: spread(common[label].to_numpy(), strata=strata) for label in columns}
    full = table[~np.logical_and.reduce(list(repeated.values()))].dropna() if columns else table
    ranks = dict(zip(columns, average_ranks(full), strict=True)) if len(full) else dict.fromkeys(columns, math.nan)
    order = sorted(columns, key=lambda k: (medians[k].estimate, ranks[k]))
    uniform = next((r.label for r in results.runs if r.searcher == "uniform" and r.label in columns), None)
    measured = dict(columns)
    if uniform is not None:  # where it failed there is nothing to be held against
        measured[uniform] = np.where(np.isfinite(columns[uniform]), columns[uniform], math.nan)
        uniform = uniform if np.isfinite(columns[uniform]).any() else None
    others = [label for label in order if label != uniform]
    fixed = {label for label in columns if all(r.deterministic for key in keys for r in results.of(key, label))}
    to_best = [(order[0], b) for b in order[1:]]
    to_uniform = [(a, uniform) for a in others] if uniform else []
    against_best = {t.b: t for t in compare_pairs(columns, to_best, repeated=repeated, fixed=fixed)}
    against_uniform = {t.a: t for t in compare_pairs(measured, to_uniform, repeated=repeated, fixed=fixed)}
    axis = axes(results, keys[0])[0] if keys else "evaluations"
    single = keys[0] if len(keys) == 1 else None
    along = single if single and any(len(r.checkpoints) > 1 for r in results.of(single)) else None
    standings = tuple(
        Standing(
            label=label,
            median=medians[label],
            iqm=spread(common[label].to_numpy(), interquartile_mean, strata),
            rank=float(ranks[label]),
            area=_area(results, along, label, axis) if along else None,
            running_times=_running_times(results, along, label, axis) if along else {},
            versus_best=against_best.get(label),
            versus_uniform=against_uniform.get(label),
            speed_up=speed_up(results, along, order[0], label, axis)
            if along and label not in (order[0], uniform)
            else None,
        )
        for label in order
    )
    ranked = len(full) > 0 and len(order) > 1
    difference = critical_difference(len(order), len(full)) if ranked else math.nan
    groups = cliques([ranks[label] for label in order], difference) if ranked else []
    value = results.problems[single].loss_name if single else "gap to the best known loss (uniform = 100)"
    return Summary(
        problems=keys,
        value=value,
        axis=axis,
        pairs=len(full),
        standings=standings,
        friedman=friedman(full.to_numpy()) if len(full) else math.nan,
        critical_difference=difference,
        cliques=tuple(tuple(order[i] for i in group) for group in groups),
        verdict=" ".join(filter(None, [_verdict(results, keys, standings, uniform, value), _lacking(table)])),
    )


def _repeated(results: Results, table: pd.DataFrame) -> dict[str, npt.NDArray[np.bool_]]:
    """Searcher -> where its value in the table of pairs is that of a run which stands for an earlier seed already."""
    keys = dict.fromkeys(table.index.get_level_values("problem")) if len(table) else {}
    return {
        label: np.array([again for key in keys for again in results.repeated(key, label)], dtype=bool)
        for label in table.columns
    }


def _common(table: pd.DataFrame) -> pd.DataFrame:
    """The pairs of the problems on which every searcher finished one; all pairs where there is no such problem."""
    if not len(table):
        return table
    known = table.notna().groupby(level="problem").transform("any").all(axis=1)
    return table[known] if known.any() else table


def _lacking(table: pd.DataFrame) -> str:
    """In words: which of several problems do not count in medians, for want of whom."""
    known = table.notna().groupby(level="problem", sort=False).any() if len(table) else table
    gaps = {str(key): [label for label in known.columns if not row[label]] for key, row in known.iterrows()}
    gaps = {key: labels for key, labels in gaps.items() if labels}
    if not gaps:
        return ""
    named = "; ".join(f"on {key}: {listed(labels)}" for key, labels in gaps.items())
    if len(gaps) < len(known):
        return f"Medians leave out problems that not every searcher finished a search on ({named})."
    return f"Medians are over different problems: none has a finished search of every searcher (missing {named})."


def _area(results: Results, problem: str, label: str, axis: str) -> Interval:
    runs = [r for r in results.by_seed(problem, label).values() if r.finished and r.checkpoints]
    budget = max(r.spent(axis) for r in results.of(problem))
    bases = [results.uniform(problem, r.seed) for r in runs]
    found = [(c, base) for c, base in zip((curve(r, axis) for r in runs), bases, strict=True) if len(c.spent)]
    return spread([area(c, budget, base.loss if base else c.loss[0]) for c, base in found])


def _running_times(results: Results, problem: str, label: str, axis: str) -> dict[float, float]:
    best, width = results.scale(problem)
    curves = [curve(r, axis) for r in results.of(problem, label) if r.finished]
    slack = results.slack(problem)
    return {goal: expected_running_time(curves, best + width * goal / 100 + slack) for goal in GOALS}


# ---------------------------------------------------------------------- in words


def _verdict(
    results: Results, keys: Sequence[str], standings: Sequence[Standing], uniform: str | None, value: str
) -> str:
    """What the figures say, and what they are too few to say."""
    done = sum(r.finished for r in results.runs if r.problem in keys)
    planned = sum(r.problem in keys for r in results.runs)
    everything = all(r.problem in keys for r in results.runs)
    planned += len(results.missing) if everything else sum(len(results.absent(key)) for key in keys)
    head = "" if done == planned else f"So far ({done} of {planned} searches finished): "
    if not standings:
        return f"{head}no search has finished yet."
    best = standings[0]
    where = "" if len(keys) == 1 else f" over {len(keys)} problems"
    unit = "seed" if len(keys) == 1 else "(problem, seed) pair"
    if not math.isfinite(best.median.estimate):
        return f"{head}no searcher has a finite median {value}{where}."
    text = f"{head}{best.label} has the least median {value}{where}, {best.median.estimate:.4g}"
    if best.label == uniform:
        return f"{text}: no searcher beat uniform compression here. {_claims(standings[1:], unit)}"
    test = best.versus_uniform
    if test is not None and len(keys) == 1:
        level = next(s.median.estimate for s in standings if s.label == uniform)
        share = f", {100 * (1 - best.median.estimate / level):.1f} % below uniform's {level:.4g}" if level > 0 else ""
        often = f"in {test.wins} of {test.pairs} seeds" if test.pairs != 1 or not test.once else "(one run each)"
        text += f"{share}, and is below uniform {often}"
    elif test is not None:
        text += f", and is below uniform in {test.wins} of {test.pairs} (problem, seed) pairs"
    if len(standings) > 1 and standings[1].median.estimate == best.median.estimate:
        text += f" (level with {standings[1].label})"
    other = elsewhere(results, keys[0], best.label) if len(keys) == 1 else ""
    return " ".join(filter(None, [f"{text}.", _claims(standings[1:], unit), other]))


def _claims(others: Sequence[Standing], unit: str) -> str:
    """What tests of the best against the others say; ``unit`` is what a pair of it is called."""
    tests = [s.versus_best for s in others if s.versus_best is not None]
    if not tests:
        return "Nothing to compare it with."
    if all(t.once and t.pairs <= 1 for t in tests):
        return "Nothing is left to chance in any of them: one run each, and nothing to test."
    if all(t.attainable >= t.alpha for t in tests):
        pairs = max(t.pairs for t in tests)
        return (
            f"{pairs} {unit}{'s are' if pairs != 1 else ' is'} too few for a claim: even a win in every {unit} would"
            f" give p = {min(t.attainable for t in tests):.2g} in {len(tests)}"
            f" comparison{'s' if len(tests) > 1 else ''} (signed-rank, Holm); it takes"
            f" {pairs_needed(len(tests), tests[0].alpha)} {unit}s or more."
        )
    found: dict[str, list[str]] = {}
    for t in tests:
        few = "once" if t.once and t.pairs <= 1 else "few"
        found.setdefault(few if t.attainable >= t.alpha else t.claim, []).append(t.b)
    shown = found.pop("better", [])
    parts = []
    if shown:
        named = listed(shown) if found or len(shown) <= MOST_NAMED else f"each of the other {len(shown)}"
        parts.append(f"Better than {named} (Wilcoxon signed-rank, Holm-corrected p < 0.05)")
    for claim, say in _OTHERWISE.items():
        if claim in found:
            parts.append(say.format(names=listed(found[claim]), unit=unit))
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


_OTHERWISE = {
    "no difference shown": "no difference shown to {names}",
    "worse": "worse than {names} by the signed-rank test (Holm-corrected p < 0.05), though its median is less",
    "few": "too few common {unit}s with {names} for a claim",
    "once": "nothing to test against {names}, for neither leaves anything to chance (one run each)",
}
"""Claim (``few``, ``once``: too few pairs for one) -> what the verdict says of the rivals that it is true of."""


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: a, b and c."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _flat(standing: Standing) -> dict[str, object]:
    found: dict[str, object] = {"searcher": standing.label, "rank": standing.rank}
    for name in ("median", "iqm", "area"):
        interval = getattr(standing, name)
        if interval is not None:
            found |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
    for name in ("versus_best", "versus_uniform"):
        test = getattr(standing, name)
        if test is not None:
            found |= {f"{name}_{k}": getattr(test, k) for k in ("pairs", "wins", "ties", "losses", "p", "p_holm")}
            found |= {f"{name}_{k}": getattr(test, k) for k in ("effect", "superiority", "claim")}
            found |= {f"{name}_difference": test.difference.estimate}
    if standing.speed_up is not None:
        found |= {"speed_up_of_best": standing.speed_up.factor.estimate, "speed_up_reached": standing.speed_up.reached}
    return found | {f"running_time_{goal:g}": time for goal, time in standing.running_times.items()}
