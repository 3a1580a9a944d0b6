"""How losses of exhaustive landscapes are spread: `python -m benchmarks.measurements.landscapes.pictures FILE.png`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from benchmarks.problems.landscape import LANDSCAPES, tabular
from evo_hpo.report.style import COLOURS, INK, clean, figure, save


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws one panel a landscape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    options = parser.parse_args(arguments)
    names = [name for name in LANDSCAPES if tabular(name).optimum is not None]
    drawn, panels = figure(3.0 * len(names), 2.9, ncols=len(names), sharey=True)
    for name, ax in zip(names, np.atleast_1d(panels), strict=True):
        _panel(ax, name)
    np.atleast_1d(panels)[0].set_ylabel("share of assignments with less loss", color=INK)
    save(drawn, options.path.with_suffix(""), ("png",))


def _panel(ax: Axes, name: str) -> None:
    """Distribution of the losses, with uniform and the optimum."""
    problem = tabular(name)
    losses = np.sort([problem.function(a) for a in problem.space.enumerate()])
    clean(ax)
    ax.plot(losses, np.arange(len(losses)) / len(losses), color=COLOURS[0], linewidth=1.8)
    level = problem.function(problem.space.uniform())
    below = float((losses < level).mean())
    ax.plot([level], [below], marker="s", color="black", linestyle="", label=f"uniform {level:.2f}")
    ax.plot(
        [losses[0]], [0], marker="*", markersize=11, color=COLOURS[1], linestyle="", label=f"optimum {losses[0]:.2f}"
    )
    ax.set_title(f"{name}: {len(losses):,} assignments", loc="left", fontsize=10, color=INK)
    ax.set_xlabel("KL (nats/token)", color=INK)
    ax.set_xlim(left=0)
    ax.legend(frameon=False, fontsize=9, loc="lower right")


if __name__ == "__main__":
    main()
