"""A picture of what a backward pass told: which units matter, by decoder block and role."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, LogNorm, Normalize
from matplotlib.figure import Figure

from evo_hpo.report.heat_maps import places_of
from evo_hpo.report.results import Results
from evo_hpo.report.search_run import SearchRun
from evo_hpo.report.style import INK, clean, figure, literal
from evo_hpo.report.tables import figure_text
from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.space.compression_space import CompressionSpace

Floats = npt.NDArray[np.float64]


def level_shown(space: CompressionSpace, found: Sensitivities) -> tuple[list[int], str]:
    """The level of each unit that is drawn, and what it is called: uniform's where that is one and costs something.

    Else the cheapest.
    """
    uniform = space.uniform()
    labels = {u.levels[k] for u, k in zip(space.units, uniform, strict=True)}
    if len(labels) == 1 and found.effects()[np.arange(len(uniform)), list(uniform)].all():
        return list(uniform), f"level {labels.pop()} (uniform's)"
    cheapest = {u.levels[0] for u in space.units}
    name = f"level {cheapest.pop()} (the cheapest)" if len(cheapest) == 1 else "its cheapest level"
    return [0] * len(space.units), name


def sensitivity_figure(space: CompressionSpace, found: Sensitivities, title: str = "") -> Figure:
    """Heat map of the predicted change of the loss when one unit alone moves, with the sums of blocks and of roles."""
    levels, level = level_shown(space, found)
    rows = np.arange(len(levels))
    effects, errors = found.effects()[rows, levels], np.sqrt(found.noise()[rows, levels])
    places, row_names, column_names, blocks = places_of(space.units)
    grid = np.full((len(row_names), len(column_names)), np.nan)
    for place, effect in zip(places, effects, strict=True):
        grid[place] = np.nansum([grid[place], effect])
    count = len(column_names)
    drawn, parts = figure(
        max(10.5, 3.6 + (0.34 if count <= 40 else 14 / count) * count), 2.6 + 0.34 * len(row_names), nrows=2, ncols=2,
        sharex="col", sharey="row", width_ratios=[max(10, count), 6], height_ratios=[2.2, max(1.6, len(row_names))],
    )  # fmt: skip
    (top, corner), (main, right) = parts
    corner.axis("off")
    colours, norm = _scale(effects)
    image = main.pcolormesh(np.ma.masked_invalid(grid), cmap=colours, norm=norm, edgecolors="white", linewidth=1.2)
    main.set_yticks(np.arange(len(row_names)) + 0.5, [*map(literal, row_names)], fontsize=9)
    step = max(1, -(-count // 40))
    main.set_xticks(np.arange(0, count, step) + 0.5, column_names[::step], fontsize=8.5)
    main.set_xlabel("decoder block" if blocks else "unit", color=INK)
    main.invert_yaxis()
    main.tick_params(length=0)
    main.spines[:].set_visible(False)
    _sums(top, right, grid)
    bar = drawn.colorbar(image, ax=corner, location="top", fraction=0.35, aspect=14, pad=-0.6)
    bar.set_label("of one unit, nats/token", fontsize=8.5, color=INK)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)
    known = effects != 0
    error = float(np.median(errors[known] / np.abs(effects[known]))) if known.any() else np.nan
    at = "the uncompressed model" if found.reference is None else "an assignment"
    total = figure_text(float(np.nansum(effects)))
    lines = [
        f"{title}predicted loss of each unit alone at {level}; together {total} nats/token",
        f"{found.kind} labels at {at}, {len(found.projections)} sequences, {found.tokens:,} tokens charged"
        + (f"; a unit's figure is good to about ±{error:.0%}" if np.isfinite(error) else ""),
    ]
    drawn.suptitle(literal("\n".join(lines)), x=0.01, ha="left", fontsize=10, color=INK)
    return drawn


def _scale(effects: Floats) -> tuple[str, Normalize]:
    """Colours on a logarithmic scale, over at most four decades; around zero where some effects are gains."""
    highest = float(np.nanmax(np.abs(effects), initial=0.0)) or 1.0
    if (effects < 0).any():
        return "PuOr_r", CenteredNorm(0, highest)
    least = float(np.nanmin(effects[effects > 0], initial=highest))
    return "YlOrBr", LogNorm(max(least, highest / 1e4) if least < highest else highest / 10, highest, clip=True)


def _sums(top: Axes, right: Axes, grid: Floats) -> None:
    columns, rows = np.nansum(grid, axis=0), np.nansum(grid, axis=1)
    top.bar(np.arange(len(columns)) + 0.5, columns, width=0.8, color="#9a9a9a")
    right.barh(np.arange(len(rows)) + 0.5, rows, height=0.7, color="#9a9a9a")
    for row, value in enumerate(rows):
        right.text(
            max(value, 0.0), row + 0.5, f" {value / (rows.sum() or 1):.0%}", va="center", fontsize=8.5, color=INK
        )
    right.set_xlim(right=float(max(rows.max(), 0.0)) * 1.35 or 1.0)
    clean(top)
    clean(right, grid="")
    top.tick_params(bottom=False, labelbottom=False)
    right.tick_params(left=False, labelleft=False)
    top.set_ylabel("sum of a block", fontsize=8.5, color=INK)
    right.set_xlabel("sum of a role, share of all", fontsize=8.5, color=INK)


def search_figure(space: CompressionSpace, run: SearchRun) -> Figure:
    """Of the first sensitivities that a search measured at the uncompressed model, or else of its first."""
    all_found = [measured.sensitivities for _, measured in run.probes]
    found = next((s for s in all_found if s.reference is None), all_found[0])
    return sensitivity_figure(space, found, f"{run.label}, seed {run.seed}: ")


def measured_best(results: Results, problem: str) -> SearchRun | None:
    """The search with the least held-out loss of those that measured sensitivities."""
    return min((r for r in results.of(problem) if r.probes), key=lambda r: r.loss, default=None)
