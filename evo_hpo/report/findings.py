"""A comparison in a notebook: what it found, with figures and statistics a method away."""

from __future__ import annotations

from matplotlib.figure import Figure

from evo_hpo.report.heat_maps import winner_figure
from evo_hpo.report.plots import anytime_figure
from evo_hpo.report.results import Results
from evo_hpo.report.summary import Summary, summarise


class Findings(Results):
    """Results to look at; :meth:`load` reads a folder."""

    def anytime(self, problem: str | None = None, axis: str | None = None) -> Figure:
        """Figure: held-out loss of the incumbent against tokens, evaluations or seconds."""
        return anytime_figure(self, self.problem(problem).key, axis)

    def profile(self, problem: str | None = None, label: str | None = None) -> Figure:
        """Figure: levels of the best assignment found, of one searcher or of all."""
        return winner_figure(self, self.problem(problem).key, label)

    def summary(self, problem: str | None = None) -> Summary:
        """Ranks, tests and effect sizes on one problem, or over all of them together."""
        return summarise(self, None if problem is None else [self.problem(problem).key])
