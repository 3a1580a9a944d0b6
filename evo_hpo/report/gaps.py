"""Held-out losses as gaps, for problems of which every seed has an instance of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from evo_hpo.record.problem_record import ProblemRecord
from evo_hpo.report.search_run import SearchRun
from evo_hpo.search.loop import Checkpoint

EXACT = 1e-9
"""Percent; what is below it is a rounding error of the loss."""

Problems = Mapping[str, ProblemRecord]


def width_of(best: float, uniform: float) -> float:
    """Loss between the best known and uniform; 1 where uniform is the best known: its gap is 0 then, not 100."""
    return uniform - best if uniform > best else 1.0


def as_gaps(problems: Problems, runs: Sequence[SearchRun]) -> tuple[Problems, list[SearchRun], dict[str, str]]:
    """Problems and searches with the losses of different instances made comparable; other problems stay as they are.

    A held-out loss becomes its gap: percent of the way from the best known loss of the search's own instance (0) to
    that of uniform compression (100). Best known: the instance's optimum, or else the least held-out loss of any
    search on it. Optima become 0. What holds seeds apart (pairs, ranks, tests) works on gaps as on losses.

    Returns:
        Problems, searches, and id -> reason of those whose instance has no uniform compression yet.
    """
    best: dict[tuple[str, int], float] = {}
    uniform: dict[tuple[str, int], float] = {}
    for run in runs:
        if instances := problems[run.problem].instances:
            instance, optimum = (run.problem, run.seed), instances[str(run.seed)]["optimum"]
            seen = min((c.loss for c in run.checkpoints), default=math.inf)
            best[instance] = min(best.get(instance, math.inf), seen if optimum is None else optimum)
            if run.searcher == "uniform" and run.loss < math.inf:
                uniform[instance] = run.loss
    shown, unmeasured = [], dict[str, str]()
    for run in runs:
        instance = run.problem, run.seed
        if not problems[run.problem].instances:
            shown.append(run)
        elif instance in uniform:
            shown.append(_scaled(run, best[instance], uniform[instance]))
        else:
            unmeasured[run.id] = "uniform compression of its instance, the measure of gaps, has no result yet"
    return {key: _scaled_problem(problem) for key, problem in problems.items()}, shown, unmeasured


def _scaled(run: SearchRun, best: float, uniform: float) -> SearchRun:
    def scaled(checkpoint: Checkpoint) -> Checkpoint:
        gap = 100 * ((checkpoint.held_out.get("loss", math.nan) - best) / width_of(best, uniform))
        return replace(checkpoint, held_out={**checkpoint.held_out, "loss": 0.0 if gap < EXACT else gap})

    return replace(run, checkpoints=tuple(map(scaled, run.checkpoints)))


def _scaled_problem(problem: ProblemRecord) -> ProblemRecord:
    if not problem.instances:
        return problem
    known = all(instance["optimum"] is not None for instance in problem.instances.values())
    return replace(problem, optimum=0.0 if known else None, reference={})
