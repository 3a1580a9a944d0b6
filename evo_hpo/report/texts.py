"""What is left of a result on text of another kind: one problem's searchers on each of its held-out texts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from evo_hpo.report.results import Results
from evo_hpo.report.style import COLOURS, FAINT, INK, MARKERS, clean, figure, literal
from evo_hpo.report.tables import Column, Row, figure_text, interval_text, percent_text, rows_by_text, wins_text


def text_columns(results: Results, problem: str) -> list[Column]:
    """The table of searchers with their figures on each text side by side; empty where there is one text."""
    found = rows_by_text(results, problem)
    if len(found) < 2:
        return []
    first, own = next(iter(found.items()))
    shown = [Column("searcher", "searcher", 0, tuple(r.searcher for r in own))]
    for text, of in found.items():
        name = "\n".join(results.on(problem, text).problems[problem].loss_lines)
        cells: list[tuple[str, str, Callable[[Row], str]]] = [
            ("loss", f"{name}\u00a0↓", lambda r: interval_text(r.loss)),
            ("gain", "below\nuniform", lambda r: percent_text(r.gain)),
            ("wins", "seeds\nbetter", wins_text),
        ]
        if text != first:
            cells.append(("text_gap", f"above\n{first}", lambda r: interval_text(r.text_gap, 3)))
            cells.append(("perplexity", "perplexity\u00a0↓", lambda r: interval_text(r.perplexity)))
        shown += [Column(f"{text}/{key}", short, 0, tuple(map(cell, of))) for key, short, cell in cells]
    return [c for c in shown if any(cell != "–" for cell in c.cells)]


def elsewhere(results: Results, problem: str, best: str) -> str:
    """In words: what the searcher that is best on the first text gains on each other one, and who is best there."""
    found = {text: {r.searcher: r for r in of} for text, of in rows_by_text(results, problem).items()}
    texts = list(found)
    if len(texts) < 2 or best not in found[texts[0]]:
        return ""
    sentences = []
    for text in texts[1:]:
        searched = [r for r in found[text].values() if r.kind != "dense" and r.seeds]
        least = min(searched, key=lambda r: r.loss.estimate)
        row = found[text][best]
        gain = "" if math.isnan(row.gain.estimate) else f", {_beside_uniform(row)}"
        other = "" if least.searcher == best else f" (least there: {least.searcher}, {least.loss.estimate:.4g})"
        gap = f"{row.text_gap.estimate:.4g} above {texts[0]}"
        sentences.append(f"On {text} {best} is at {row.loss.estimate:.4g}{gain}{other}, {gap}.")
    return " ".join(sentences)


def _beside_uniform(row: Row) -> str:
    side = "below" if row.gain.estimate >= 0 else "above"
    return f"{abs(row.gain.estimate):.1f} % {side} uniform and below it in {row.wins} of {row.compared} seeds"


def gains_figure(results: Results, problem: str) -> Figure:
    """Percent below uniform of every searcher on each text: how far its marks lie apart is what one text flatters."""
    found = rows_by_text(results, problem)
    texts = list(found)
    labels = [r.searcher for r in found[texts[0]] if not math.isnan(r.gain.estimate)]
    gains = np.array([[{r.searcher: r for r in found[t]}[label].gain.estimate for t in texts] for label in labels])
    drawn, ax = figure(9.0, 1.5 + 0.36 * max(1, len(labels)))
    clean(ax, grid="x")
    places = np.arange(len(labels))
    least = _left_edge(gains)
    shown = np.maximum(gains, least)
    ax.hlines(places, shown.min(axis=1), shown.max(axis=1), color="#c8c8c8", linewidth=3, zorder=1)
    for i, text in enumerate(texts):
        mark, colour = MARKERS[i % len(MARKERS)], COLOURS[i % len(COLOURS)]
        ax.scatter(shown[:, i], places, color=colour, marker=mark, s=55, alpha=0.85, label=literal(text), zorder=2)
    for place, row in zip(places, gains, strict=True):
        if row.min() < least:
            beyond = ", ".join(f"{figure_text(v, 3)} %" for v in row if v < least)
            ax.annotate(f"← {beyond}", (least, place), (-4, 8), textcoords="offset points", fontsize=8, color=INK)
    ax.axvline(0, color="black", dashes=(4, 2), linewidth=1.4)
    ax.annotate(
        "uniform", (0, 1.0), (3, 3), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8.5
    )
    ax.set_yticks(places, [literal(label) for label in labels])
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlabel("percent below uniform (median over seeds), right is better", color=INK)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, title="on", title_fontsize=9)
    ax.spines["left"].set_color(FAINT)
    return drawn


def _left_edge(gains: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> float:
    """Where to cut the picture, so that what is far worse than uniform does not squeeze the rest."""
    highest = float(gains.max(initial=1.0))
    return -1.5 * highest if gains.min(initial=0.0) < -3 * highest else -math.inf
