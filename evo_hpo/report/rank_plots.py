"""Pictures of ranks: the critical-difference diagram, and wins of each searcher over each other one."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evo_hpo.report.results import Results
from evo_hpo.report.statistics import wins_ties_losses
from evo_hpo.report.style import FAINT, INK, clean, figure, literal
from evo_hpo.report.summary import Summary


def rank_figure(summary: Summary) -> Figure:
    """Critical-difference diagram: average ranks (1 is best), bars join what the Nemenyi test cannot tell apart."""
    ranked = sorted((s for s in summary.standings if not math.isnan(s.rank)), key=lambda s: s.rank)
    count = len(ranked)
    axis = max(4.9, 0.3 * count)  # inches, and beside it room for the longest label
    side = max(2.05, 0.5 + 0.08 * max((len(s.label) + 7 for s in ranked), default=0))
    drawn, ax = figure(axis + 2 * side, max(1.6, 1.1 + 0.3 * math.ceil(count / 2) + 0.16 * len(summary.cliques)))
    ax.axis("off")
    if count < 2:
        ax.text(0.5, 0.5, "ranks need two searchers with a common finished seed", ha="center", color=FAINT)
        return drawn
    width = count - 1
    half = math.ceil(count / 2)
    bars = 0.55 * len(summary.cliques)
    bottom = -(bars + 1.0 + half)
    margin = width * side / axis
    ax.set_xlim(1 - margin, count + margin)
    ax.set_ylim(bottom, 2.6)
    ax.plot([1, count], [0, 0], color=INK, linewidth=1.2)
    for tick in range(1, count + 1) if count <= 15 else sorted({1, *range(5, count - 1, 5), count}):
        ax.plot([tick, tick], [0, 0.25], color=INK, linewidth=1.2)
        ax.text(tick, 0.4, str(tick), ha="center", va="bottom", fontsize=9, color=INK)
    _ruler(ax, summary.critical_difference, width)
    for position, s in enumerate(ranked):
        left = position < half
        y = -(bars + 0.9 + (position if left else count - 1 - position))
        x = 1 - 0.04 * width if left else count + 0.04 * width
        ax.plot([s.rank, s.rank, x], [0, y, y], color=FAINT, linewidth=0.9)
        ax.plot([s.rank], [0], marker="o", markersize=5, color="#0072B2")
        text = f"{literal(s.label)}  {s.rank:.2f}" if left else f"{s.rank:.2f}  {literal(s.label)}"
        ax.text(x - 0.02 * width if left else x + 0.02 * width, y, text, ha="right" if left else "left", va="center",
                fontsize=9.5, color=INK)  # fmt: skip
    ranks = {s.label: s.rank for s in ranked}
    for level, group in enumerate(summary.cliques, start=1):
        span = [ranks[label] for label in group if label in ranks]
        ax.plot([min(span) - 0.02 * width, max(span) + 0.02 * width], [-0.5 * level] * 2, color="#D55E00",
                linewidth=4, solid_capstyle="round")  # fmt: skip
    return drawn


def _ruler(ax: Axes, difference: float, width: float) -> None:
    """The critical difference as a length, where it fits."""
    text = f"critical difference {difference:.2f}"
    if difference <= 1.4 * width:
        ax.plot([1, 1 + difference], [1.7, 1.7], color=INK, linewidth=1.6, marker="|", markersize=8)
        ax.text(1 + difference + 0.03 * width, 1.7, text, va="center", fontsize=9, color=INK)
    else:
        ax.text(1, 1.7, f"{text}, more than the whole axis: too few pairs", va="center", fontsize=9, color=INK)


def wins_figure(results: Results, summary: Summary) -> Figure:
    """Share of common pairs in which the row is below the column (ties half)."""
    table = results.pairs()
    table = table[table.index.get_level_values("problem").isin(summary.problems)]
    labels = [s.label for s in summary.standings]
    count = len(labels)
    shares = np.full((count, count), np.nan)
    for i, a in enumerate(labels):
        for j, b in enumerate(labels):
            wins, ties, losses = wins_ties_losses(table[a].to_numpy(), table[b].to_numpy())
            total = wins + ties + losses
            if i != j and total:
                shares[i, j] = (wins + ties / 2) / total
    size = 0.55 if count <= 14 else 8 / count
    drawn, ax = figure(2.6 + size * count, 1.8 + 0.8 * size * count)
    clean(ax, grid="")
    ax.pcolormesh(np.ma.masked_invalid(shares), cmap="PuOr", vmin=-0.1, vmax=1.1, edgecolors="white", linewidth=1.2)
    for i, j in np.argwhere(~np.isnan(shares)):
        share = shares[i, j]
        ink = INK if 0.12 < share < 0.88 else "white"
        ax.text(j + 0.5, i + 0.5, f"{share:.0%}", ha="center", va="center", fontsize=8, color=ink)
    names = [literal(label) for label in labels]
    ax.set_xticks(np.arange(count) + 0.5, names, rotation=40, ha="right", fontsize=8.5)
    ax.set_yticks(np.arange(count) + 0.5, names, fontsize=8.5)
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return drawn
