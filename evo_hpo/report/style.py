"""How pictures look: a colour, dash and marker for each searcher, readable without telling colours apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from evo_hpo.report.results import Results

# Okabe and Ito's colours for every kind of colour vision; black is kept for uniform, yellow is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F4F9E")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
DPI = 150
INK, FAINT = "#222222", "#8a8a8a"


@dataclass(frozen=True)
class LineStyle:
    """Colour, dash pattern and marker of a searcher."""

    colour: str
    dash: Any
    marker: str


def line_styles(results: Results) -> dict[str, LineStyle]:
    """Label -> style, the same in every picture of a comparison; uniform is black and dashed."""
    found, position = {}, 0
    for label in results.labels:
        if any(r.label == label and r.searcher == "uniform" for r in results.runs):
            found[label] = LineStyle("black", (0, (4, 2)), "")
            continue
        dash = DASHES[position // len(COLOURS) % len(DASHES)]
        found[label] = LineStyle(COLOURS[position % len(COLOURS)], dash, MARKERS[position % len(MARKERS)])
        position += 1
    return found


def figure(width: float, height: float, **grid: Any) -> tuple[Figure, Any]:
    """A figure (inches) without pyplot and its axes, as ``Figure.subplots`` gives them."""
    found = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(found)
    return found, found.subplots(**grid)


def literal(text: str) -> str:
    """Text that a picture shows as it is: matplotlib reads formulas between ``$``, and no legend has ``_name``."""
    escaped = text.replace("$", r"\$")
    return f"\u200b{escaped}" if text.startswith("_") else escaped  # a space without width


def clean(axes: Axes, *, grid: str = "y") -> None:
    """Thin frame, light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color="#e4e4e4", linewidth=0.8)  # type: ignore[arg-type]


def thousands(axes: Axes) -> None:
    """Large counts on the x axis as 20k, 1.5M."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))


def short_count(value: float) -> str:
    """20000 as 20k, 1500000 as 1.5M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def save(drawn: Figure, stem: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Writes ``stem.png`` (at :data:`DPI`) and ``stem.svg``, the same bytes for the same figure."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    drawn.dpi = DPI
    if (engine := drawn.get_layout_engine()) is not None:  # laid out once, not for each format before it is drawn
        engine.execute(drawn)
        drawn.set_layout_engine(None)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in formats]
    for path in paths:
        if path.suffix == ".png":
            _save_reduced(drawn, path)
            continue
        with matplotlib.rc_context({"svg.hashsalt": "evo-hpo", "svg.fonttype": "path"}):
            drawn.savefig(path, metadata={"Date": None})
    return paths


def _save_reduced(drawn: Figure, path: Path) -> None:
    """A palette of 128 colours: a third of the bytes, and no difference to be seen."""
    canvas: Any = FigureCanvasAgg(drawn)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    small = image.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
