"""How a search came to its result: the chain of trials from the start to the recommended assignment."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evo_hpo.report.search_run import SearchRun
from evo_hpo.report.style import INK, clean, figure, literal, thousands
from evo_hpo.search.trial import Outcome
from evo_hpo.space.compression_space import Assignment, CompressionSpace


@dataclass(frozen=True)
class Step:
    """One ancestor of the result.

    Attributes:
        trial, generation: of the searcher's count.
        tokens, evaluations: spent when it was first scored.
        levels: the assignment.
        changes: (unit, old label, new label) against the ancestor before it; empty for the first.
        distance: units whose level is not that of uniform compression.
    """

    trial: int
    generation: int
    tokens: int
    evaluations: int
    levels: Assignment
    changes: tuple[tuple[str, str, str], ...]
    distance: int


def lineage(run: SearchRun, space: CompressionSpace) -> list[Step]:
    """Ancestors of a search's result, first to last; empty where it was never scored itself.

    Parents that were only scored again count once.
    """
    if run.final is None:
        return []
    chain = []
    by_number: dict[int, tuple[Outcome, int, int]] = {}
    for position, (outcome, spent) in enumerate(zip(run.outcomes, run.tokens_so_far(), strict=True), start=1):
        by_number.setdefault(outcome.trial.number, (outcome, spent, position))
    found = [o.trial for o in run.outcomes if o.trial.levels == run.final.levels]
    number = next((t.number for t in [*(t for t in found if t.parent is not None), *found]), None)
    seen: set[int] = set()
    while number is not None and number in by_number and number not in seen:
        seen.add(number)
        chain.append(by_number[number])
        number = chain[-1][0].trial.parent
    steps: list[Step] = []
    uniform = space.uniform()
    for outcome, tokens, evaluations in reversed(chain):
        trial = outcome.trial
        if steps and steps[-1].levels == trial.levels:
            continue
        before = steps[-1].levels if steps else trial.levels
        changes = tuple(
            (u.name, u.levels[a], u.levels[b])
            for u, a, b in zip(space.units, before, trial.levels, strict=True)
            if a != b
        )
        distance = sum(a != b for a, b in zip(uniform, trial.levels, strict=True))
        steps.append(Step(trial.number, outcome.terms.generation, tokens, evaluations, trial.levels, changes, distance))
    return steps


def lineage_figure(run: SearchRun, space: CompressionSpace) -> Figure:
    """Units unlike uniform compression, and units changed by each step, against what was spent."""
    steps = lineage(run, space)
    drawn, ax = figure(9.0, 3.2)
    clean(ax)
    count = max(0, len(steps) - 1)
    charged = run.tokens > 0
    spent = [s.tokens if charged else s.evaluations for s in steps]
    ax.plot(spent, [s.distance for s in steps], drawstyle="steps-post", color="#0072B2", linewidth=1.8, marker="o",
            markersize=4, label="units unlike uniform compression")  # fmt: skip
    ax.bar(spent[1:], [len(s.changes) for s in steps[1:]], width=max(spent, default=1) / 150, color="#D55E00",
           label="units changed by this step")  # fmt: skip
    ax.set_xlabel("calibration tokens spent" if charged else "trials scored", color=INK)
    ax.set_ylabel("units", color=INK)
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    thousands(ax)
    title = f"{run.label}, seed {run.seed}: {count} accepted step{'s' if count != 1 else ''}"
    ax.set_title(literal(title), loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn
