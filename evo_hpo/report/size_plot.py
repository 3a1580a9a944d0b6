"""Size against quality: one point a model, one panel a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from evo_hpo.report.style import COLOURS, INK, MARKERS, clean, figure, literal


def size_figure(results: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> Figure:
    """The rows of an evaluation (as :meth:`Evaluation.to_json` gives them), bytes to the right, perplexity up.

    A model whose bytes are not known (0) is in the table alone.
    """
    results = [row for row in results if row["bytes"]]
    drawn, found = figure(1.2 + 4.6 * len(texts), 3.8, ncols=len(texts), squeeze=False)
    for axes, text in zip(found[0], texts, strict=True):
        levels = [row["texts"][text]["perplexity"] for row in results]
        for number, (row, level) in enumerate(zip(results, levels, strict=True)):
            ends = [level["low"], level["high"]]
            error = None if None in ends else [[level["mean"] - ends[0]], [ends[1] - level["mean"]]]
            axes.errorbar(
                row["bytes"] / 1e6,
                level["mean"],
                yerr=error,
                fmt=MARKERS[number % len(MARKERS)],
                color=INK if row["name"] == "original" else COLOURS[number % len(COLOURS)],
                capsize=3,
                label=literal(row["name"]),
            )
        means = [level["mean"] for level in levels]
        if means and max(means) > 5 * min(means):
            axes.set_yscale("log")
        axes.set_xlabel("file, MB")
        axes.set_ylabel("perplexity, 95 % interval")
        axes.set_title(literal(str(text)))
        clean(axes)
    if results:
        found[0][-1].legend(frameon=False, fontsize=9)
    return drawn
