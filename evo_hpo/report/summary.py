"""Who is ahead, by how much, and how sure that is: all statistics of one problem, or over all problems together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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
        median, iqm: of the summary's value over (problem, seed) pairs.
        rank: average over the pairs that every searcher finished; NaN without any.
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
    strata = [str(p) for p in table.index.get_level_values("problem")] if len(table) else []
    columns = {label: table[label].to_numpy(dtype=np.float64) for label in table.columns}
    medians = {label: spread(values, strata=strata) for label, values in columns.items()}
    full = table.dropna()
    ranks = dict(zip(columns, average_ranks(full), strict=True)) if len(full) else dict.fromkeys(columns, math.nan)
    order = sorted(columns, key=lambda k: (medians[k].estimate, ranks[k]))
    uniform = next((r.label for r in results.runs if r.searcher == "uniform" and r.label in columns), None)
    rivals = order[1:]
    against_best = {t.b: t for t in compare_pairs(columns, [(order[0], b) for b in rivals])} if rivals else {}
    others = [label for label in order if label != uniform]
    against_uniform = {t.a: t for t in compare_pairs(columns, [(a, uniform) for a in others])} if uniform else {}
    axis = axes(results, keys[0])[0] if keys else "evaluations"
    single = keys[0] if len(keys) == 1 else None
    along = single if single and any(len(r.checkpoints) > 1 for r in results.of(single)) else None
    standings = tuple(
        Standing(
            label=label,
            median=medians[label],
            iqm=spread(columns[label], interquartile_mean, strata),
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
        verdict=_verdict(results, keys, standings, uniform, value),
    )


def _area(results: Results, problem: str, label: str, axis: str) -> Interval:
    runs = [r for r in results.by_seed(problem, label).values() if r.finished and r.checkpoints]
    budget = max(r.spent(axis) for r in results.of(problem))
    uniform = results.uniform(problem)
    curves = [c for c in (curve(r, axis) for r in runs) if len(c.spent)]
    return spread([area(c, budget, uniform.loss if uniform else c.loss[0]) for c in curves])


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
    if len(keys) == len(results.problems):
        planned += len(results.missing)
    head = "" if done == planned else f"So far ({done} of {planned} searches finished): "
    if not standings:
        return f"{head}no search has finished yet."
    best = standings[0]
    where = "" if len(keys) == 1 else f" over {len(keys)} problems"
    text = f"{head}{best.label} has the least median {value}{where}, {best.median.estimate:.4g}"
    if best.label == uniform:
        return f"{text}: no searcher beat uniform compression here. {_claims(standings[1:])}".rstrip()
    test = best.versus_uniform
    if test is not None and len(keys) == 1:
        level = next(s.median.estimate for s in standings if s.label == uniform)
        share = f", {100 * (1 - best.median.estimate / level):.1f} % below uniform's {level:.4g}" if level > 0 else ""
        text += f"{share}, and is below uniform in {test.wins} of {test.pairs} seeds"
    elif test is not None:
        text += f", and is below uniform in {test.wins} of {test.pairs} (problem, seed) pairs"
    if len(standings) > 1 and standings[1].median.estimate == best.median.estimate:
        text += f" (level with {standings[1].label})"
    other = elsewhere(results, keys[0], best.label) if len(keys) == 1 else ""
    return " ".join(filter(None, [f"{text}.", _claims(standings[1:]), other]))


def _claims(others: Sequence[Standing]) -> str:
    tests = [s.versus_best for s in others if s.versus_best is not None]
    if not tests:
        return "Nothing to compare it with."
    if all(t.attainable >= t.alpha for t in tests):
        pairs = max(t.pairs for t in tests)
        return (
            f"{pairs} seed{'s are' if pairs != 1 else ' is'} too few for a claim: even a win in every seed would give"
            f" p = {min(t.attainable for t in tests):.2g} in {len(tests)} comparison{'s' if len(tests) > 1 else ''}"
            f" (signed-rank, Holm); it takes {pairs_needed(len(tests), tests[0].alpha)} seeds or more."
        )
    shown = [t.b for t in tests if t.claim == "better"]
    open_ = [t.b for t in tests if t.claim != "better"]
    parts = []
    if shown:
        named = _listed(shown) if open_ or len(shown) <= MOST_NAMED else f"each of the other {len(shown)}"
        parts.append(f"Better than {named} (Wilcoxon signed-rank, Holm-corrected p < 0.05)")
    if open_:
        parts.append(f"no difference shown to {_listed(open_)}")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def _listed(names: Sequence[str]) -> str:
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
