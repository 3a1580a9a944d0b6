"""Pictures of assignments: which unit got which level, by decoder block and role."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from evo_hpo.report.results import Results
from evo_hpo.report.style import FAINT, INK, clean, figure, literal
from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit
from evo_hpo.space.spending import spent

Floats = npt.NDArray[np.float64]


def level_values(space: CompressionSpace) -> tuple[list[list[float]], bool]:
    """The number that each level of each unit stands for, and whether labels gave it (bits, sparsity).

    Labels that are not all numbers ("dropped", "kept") count as their index, evenly from 0 to 1. Where units have
    different ones, an index says nothing: there a label counts as what it costs a weight, over all units that have it.
    """
    try:
        return [[float(label) for label in u.levels] for u in space.units], True
    except ValueError:
        if len({u.levels for u in space.units}) == 1:
            return [[k / max(1, len(u.levels) - 1) for k in range(len(u.levels))] for u in space.units], False
    costs, sizes = Counter[str](), Counter[str]()
    for unit, vectors in zip(space.units, space.vectors, strict=True):
        for label, vector in zip(unit.levels, vectors, strict=True):
            costs[label] += vector[0]
            sizes[label] += unit.size
    return [[costs[label] / sizes[label] for label in u.levels] for u in space.units], False


@dataclass(frozen=True)
class Layout:
    """An assignment laid out for a picture.

    Attributes:
        values: rows (roles) x columns (blocks); NaN where there is no unit; units that share a cell are averaged.
        text: what to write into each cell.
        row_names, column_names: roles and block numbers; for units without blocks, lines of units.
        row_means, column_means: averages over weights.
        mean: over all weights.
        blocks: False when the names hold no block numbers.
    """

    values: Floats
    text: list[list[str]]
    row_names: list[str]
    column_names: list[str]
    row_means: Floats
    column_means: Floats
    mean: float
    blocks: bool


def layout_of(space: CompressionSpace, levels: Assignment) -> Layout:
    """Lays an assignment out as roles x blocks, or 32 units a line where names hold no blocks."""
    places, row_names, column_names, blocks = places_of(space.units)
    numbers, _ = level_values(space)
    shape = (len(row_names), len(column_names))
    total, weight = np.zeros(shape), np.zeros(shape)
    text = [["" for _ in column_names] for _ in row_names]
    for unit, values, level, (row, column) in zip(space.units, numbers, levels, places, strict=True):
        total[row, column] += unit.size * values[level]
        text[row][column] = "" if weight[row, column] else unit.levels[level]
        weight[row, column] += unit.size
    with np.errstate(invalid="ignore"):
        return Layout(
            total / np.where(weight > 0, weight, np.nan), text, row_names, column_names,
            total.sum(axis=1) / weight.sum(axis=1), total.sum(axis=0) / weight.sum(axis=0),
            float(total.sum() / weight.sum()), blocks,
        )  # fmt: skip


def places_of(units: Sequence[Unit]) -> tuple[list[tuple[int, int]], list[str], list[str], bool]:
    """Row and column of each unit, their names (roles and blocks), and whether names hold blocks; else lines of 32.

    Embedding and head, units beside blocks, have rows of their own and share the last column.
    """
    outer = [u for u in units if u.block is None]
    if 2 * len(outer) >= len(units):
        width = min(len(units), 32)
        names = [f"{i * width}" for i in range(math.ceil(len(units) / width))]
        return [divmod(i, width) for i in range(len(units))], names, [str(i) for i in range(width)], False
    own = [u.name if u.block is None else u.role for u in units]
    roles = list(dict.fromkeys(own))
    short = [r.rsplit(".", 1)[-1] for r in roles]
    columns = [*map(str, sorted({u.block for u in units if u.block is not None})), *["-"] * bool(outer)]
    places = [
        (roles.index(role), columns.index("-" if u.block is None else str(u.block)))
        for u, role in zip(units, own, strict=True)
    ]
    return places, short if len(set(short)) == len(short) else roles, columns, True


@dataclass(frozen=True)
class _Scale:
    """Colour of a level's value and the labels of it; orange: compressed more than the average, purple: less."""

    values: list[float]
    labels: list[str]
    colours: Colormap
    norm: BoundaryNorm

    @classmethod
    def of(cls, space: CompressionSpace, centre: float) -> _Scale:
        numbers, numeric = level_values(space)
        names: dict[float, dict[str, None]] = {}
        for unit, own in zip(space.units, numbers, strict=True):
            for value, name in zip(own, unit.levels, strict=True):
                names.setdefault(value, {})[name] = None
        values = sorted(names)
        falling = numeric and any(vs[0] > vs[-1] for vs in numbers)  # sparsity: a larger number is smaller
        edges = [(a + b) / 2 for a, b in itertools.pairwise(values)]
        bounds = [values[0] - 0.5, *edges, values[-1] + 0.5]
        # Each side of the average has a full range of shades: 2 bits show beside 3 though levels go up to 6.
        reach = [max(centre - values[0], 1e-9), max(values[-1] - centre, 1e-9)]
        # The middle of PuOr is nearly white: near the average a cell looks empty, and what deviates stands out.
        shares = [0.5 + 0.42 * (v - centre) / reach[v > centre] * (-1 if falling else 1) for v in values]
        labels = [literal(" / ".join(names[v])) for v in values]
        return cls(values, labels, ListedColormap(colormaps["PuOr"](shares)), _norm(bounds))

    def colour(self, value: float) -> tuple[float, float, float, float]:
        """RGBA of a value."""
        r, g, b, a = self.colours(int(self.norm(value)))
        return float(r), float(g), float(b), float(a)


def _norm(bounds: list[float]) -> BoundaryNorm:
    return BoundaryNorm(bounds, len(bounds) - 1, clip=True)


def profile_figure(space: CompressionSpace, levels: Assignment, title: str = "") -> Figure:
    """Heat map of an assignment, blocks from left to right and roles from top to bottom, with averages of both."""
    grid = layout_of(space, levels)
    rows, columns = grid.values.shape
    cell = 0.34 if columns <= 40 else 14 / columns
    drawn, parts = figure(
        max(6.5, 2.8 + cell * columns), max(2.6, 2.0 + 0.34 * rows), nrows=2, ncols=2, sharex="col", sharey="row",
        width_ratios=[max(10, columns), 4.5], height_ratios=[2.2, max(1.6, rows)],
    )  # fmt: skip
    (top, corner), (main, right) = parts
    scale = _Scale.of(space, grid.mean)
    _heat(main, grid, scale)
    _means(top, right, grid)
    _legend(corner, scale)
    if title:
        drawn.suptitle(literal(title), x=0.01, ha="left", fontsize=10.5, color=INK)
    return drawn


def _heat(ax: Axes, grid: Layout, scale: _Scale) -> None:
    rows, columns = grid.values.shape
    image = np.ma.masked_invalid(grid.values)
    ax.pcolormesh(image, cmap=scale.colours, norm=scale.norm, edgecolors="white", linewidth=1.2)
    ax.set_yticks(np.arange(rows) + 0.5, [*map(literal, grid.row_names)], fontsize=9)
    step = max(1, math.ceil(columns / 40))
    ax.set_xticks(np.arange(0, columns, step) + 0.5, grid.column_names[::step], fontsize=8.5)
    ax.set_xlabel("decoder block" if grid.blocks else "unit", color=INK)
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    longest = max((len(t) for line in grid.text for t in line), default=0)
    if columns > 40 or longest > 4:
        return
    for row, column in np.argwhere(~np.isnan(grid.values)):
        r, g, b, _ = scale.colour(float(grid.values[row, column]))
        ink = INK if 0.299 * r + 0.587 * g + 0.114 * b > 0.55 else "white"
        text = grid.text[row][column] or f"{grid.values[row, column]:.1f}"
        size = 8 if longest < 4 else 6.5
        ax.text(column + 0.5, row + 0.5, literal(text), ha="center", va="center", fontsize=size, color=ink)


def _means(top: Axes, right: Axes, grid: Layout) -> None:
    columns, rows = np.arange(len(grid.column_names)) + 0.5, np.arange(len(grid.row_names)) + 0.5
    values = np.concatenate([grid.row_means, grid.column_means])
    margin = 0.15 * (np.nanmax(values) - np.nanmin(values)) or 0.5
    low, high = float(np.nanmin(values) - margin), float(np.nanmax(values) + margin)
    top.bar(columns, grid.column_means - grid.mean, bottom=grid.mean, width=0.8, color="#9a9a9a")
    right.barh(rows, grid.row_means - grid.mean, left=grid.mean, height=0.7, color="#9a9a9a")
    top.axhline(grid.mean, color=INK, linewidth=0.9)
    right.axvline(grid.mean, color=INK, linewidth=0.9)
    top.set_ylim(low, high)
    right.set_xlim(low, high + 0.45 * (high - low))
    for row, value in zip(rows, grid.row_means, strict=True):
        right.text(max(value, grid.mean), row, f" {value:.2f}", va="center", fontsize=8.5, color=INK)
    clean(top)
    clean(right, grid="")
    top.tick_params(bottom=False, labelbottom=False)
    right.tick_params(left=False, labelleft=False)
    top.set_ylabel("average", fontsize=8.5, color=INK)
    right.set_xlabel(f"average (all: {grid.mean:.3f})", fontsize=8.5, color=INK)


def _legend(ax: Axes, scale: _Scale) -> None:
    ax.axis("off")
    chosen = range(len(scale.values))
    if len(scale.values) > 8:
        chosen = range(0, len(scale.values), math.ceil(len(scale.values) / 8))
    for i in chosen:
        ax.scatter([], [], marker="s", s=60, color=scale.colours(i), edgecolors=FAINT, label=scale.labels[i])
    ax.legend(
        loc="center", frameon=False, fontsize=8, ncols=4 if len(chosen) > 6 else len(chosen), title="level",
        title_fontsize=8.5, handletextpad=0.1, columnspacing=0.8,
    )  # fmt: skip


def winner_figure(results: Results, problem: str, label: str | None = None) -> Figure:
    """The best assignment of a problem (or of one searcher on it): least held-out loss over its seeds."""
    info = results.problems[problem]
    best = results.winner(problem, label)
    if best is None or best.final is None:
        drawn, ax = figure(6.5, 2.0)
        ax.axis("off")
        ax.text(0.5, 0.5, "no assignment yet", ha="center", color=FAINT)
        return drawn
    title = (
        f"{best.label}, seed {best.seed}: {info.loss_name} {best.loss:.4g},"
        f" {info.average_name} {info.space.average(best.final.levels):.4g}"
    )
    for name, of in list(spent(info.space, best.final.levels).items())[1:]:
        title += f"\n{name}: {of['cost']:,} of {of['budget']:,}"
    return profile_figure(info.space, best.final.levels, title)


def profiles_figure(results: Results, problem: str, labels: Sequence[str]) -> Figure:
    """Small heat maps side by side: the best assignment of each searcher, in the order given."""
    space = results.problems[problem].space
    runs = [r for r in (results.winner(problem, label) for label in labels) if r is not None]
    grids = [layout_of(space, r.final.levels) for r in runs if r.final is not None]
    wide = 2 if len(runs) > 1 else 1
    lines = max(1, math.ceil(len(runs) / wide))
    height = 0.75 + 0.16 * (len(grids[0].row_names) if grids else 1)
    drawn, parts = figure(11.0, 0.5 + height * lines, nrows=lines, ncols=wide, squeeze=False)
    scale = _Scale.of(space, grids[0].mean if grids else 0.0)
    for ax in parts.flat:
        ax.axis("off")
    for ax, run, grid in zip(parts.flat, runs, grids, strict=False):
        ax.axis("on")
        ax.pcolormesh(np.ma.masked_invalid(grid.values), cmap=scale.colours, norm=scale.norm, edgecolors="white",
                      linewidth=0.5)  # fmt: skip
        ax.invert_yaxis()
        ax.set_yticks(np.arange(len(grid.row_names)) + 0.5, [*map(literal, grid.row_names)], fontsize=7)
        step = max(1, len(grid.column_names) // 10)
        ax.set_xticks(np.arange(0, len(grid.column_names), step) + 0.5, grid.column_names[::step], fontsize=7)
        ax.tick_params(length=0)
        ax.spines[:].set_color("#cccccc")
        ax.set_title(f"{literal(run.label)}, seed {run.seed}: {run.loss:.4g}", loc="left", fontsize=8.5, color=INK)
    handles = [Patch(facecolor=scale.colours(i), edgecolor=FAINT, label=label) for i, label in enumerate(scale.labels)]
    drawn.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 12), frameon=False, fontsize=8)
    return drawn
