"""Writes everything that a comparison's reader wants: tables, pictures, one HTML page."""

from __future__ import annotations

from pathlib import Path

from evo_hpo.analysis.comparison import Comparison
from evo_hpo.analysis.curves import axes
from evo_hpo.analysis.plots import anytime_figure
from evo_hpo.analysis.profiles import winner_figure
from evo_hpo.analysis.style import save
from evo_hpo.analysis.tables import write_tables

__all__ = ["write_report"]


def write_report(folder: Path | str) -> Path:
    """Writes ``<folder>/report`` from what the comparison's journals hold so far; returns the HTML page.

    Raises:
        PlanError: not a comparison's folder.
    """
    comparison = Comparison.load(folder)
    target = Path(folder) / "report"
    write_tables(comparison, target)
    for position, problem in enumerate(comparison.problems):
        suffix = "" if position == 0 else f"-{position + 1}"
        for axis in axes(comparison, problem):
            name = "anytime-seconds" if axis == "seconds" else "anytime"
            save(anytime_figure(comparison, problem, axis), target / f"{name}{suffix}")
        save(winner_figure(comparison, problem), target / f"profile{suffix}")
    return target / "report.html"
