"""Curves: the incumbent's held-out loss against what was spent, and how many targets are met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from evo_hpo.report.curves import Band, attainment, axes, band, curve, targets
from evo_hpo.report.results import Results
from evo_hpo.report.style import FAINT, INK, LineStyle, clean, figure, line_styles, literal, thousands
from evo_hpo.report.tables import figure_text
from evo_hpo.search.budget import KINDS

SHOWN = 14
"""Most lines in one picture; tables hold all searchers."""

FACTOR = 2.5
"""From so many times the least loss on, uniform would squeeze what lies below it: losses are then drawn by factors."""

MOST = 1e3
"""Up to so many times: beyond, factors would show nothing but how near to 0 a search came."""


def anytime_figure(results: Results, problem: str, axis: str | None = None) -> Figure:
    """Held-out loss of the incumbent against tokens, evaluations or seconds; median over seeds with its band.

    Several held-out texts stand one below the other.
    """
    axis = axis or axes(results, problem)[0]
    texts = results.problems[problem].texts
    shown = [results.on(problem, text) for text in texts] or [results]
    height = 4.8 if len(shown) == 1 else 3.9 * len(shown)
    drawn, parts = figure(9.0, height, nrows=len(shown), sharex=True, squeeze=False)
    order, styles = shown_labels(results, problem), line_styles(results)
    for ax, on in zip(parts.flat, shown, strict=True):
        bands = _anytime(ax, on, problem, axis, order, styles)
        if ax is parts.flat[0]:
            ax.set_title(_title(results, problem, bands), loc="left", fontsize=10, color=INK)
    parts.flat[-1].set_xlabel(KINDS[axis], color=INK)
    return drawn


def _anytime(
    ax: Axes, results: Results, problem: str, axis: str, labels: Sequence[str], styles: Mapping[str, LineStyle]
) -> dict[str, Band]:
    """The curves on one text."""
    info = results.problems[problem]
    clean(ax)
    bands = _bands(results, problem, axis, labels)
    end = max((b.x[-1] for b in bands.values() if b.count), default=1.0)
    names = {label: literal(label) + ("" if b.finished else " (so far)") for label, b in bands.items()}
    for label, b in sorted(bands.items(), key=lambda item: -item[1].middle[-1] if item[1].count else 0):
        if b.count:
            _draw(ax, b, end, f"{names[label]}  {figure_text(b.middle[-1])}", styles[label])
    uniform = _uniform(results, problem)
    if uniform is not None:
        ax.axhline(uniform, color="black", dashes=(4, 2), linewidth=1.4)
        ax.plot([], [], color="black", dashes=(4, 2), linewidth=1.4, label=f"uniform  {figure_text(uniform)}")
    ax.set_xlim(0, end * 1.005)
    hidden = {names[label] for label in _focus(ax, bands, uniform)}
    _references(ax, info.reference.get("loss"), info.optimum)
    loss = literal(info.loss_name)
    ax.set_ylabel(f"{loss}, lower is better" if not info.texts else f"{loss} ↓", color=INK)
    thousands(ax)
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    if handles:
        entries = sorted(handles, key=lambda name: -_last_figure(name))
        shown = [f"{n}  ↑" if n.rsplit("  ", 1)[0] in hidden else n for n in entries]
        title = "at the end, median" + ("\n(↑ above this picture)" if hidden else "")
        ax.legend(
            [handles[n] for n in entries], shown, title=title,
            loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, title_fontsize=9,
        )  # fmt: skip
    else:
        ax.text(0.5, 0.5, "no held-out checkpoint yet", transform=ax.transAxes, ha="center", color=FAINT)
    return bands


def _uniform(results: Results, problem: str) -> float | None:
    """Loss of uniform compression; of instances, each with its own, the median."""
    losses = [r.loss for r in results.of(problem) if r.searcher == "uniform" and math.isfinite(r.loss)]
    return float(np.median(losses)) if losses else None


def _last_figure(name: str) -> float:
    """The figure at the end of a legend entry; what has none (failed) is worst."""
    try:
        return float(name.rsplit("  ", 1)[-1].replace(",", ""))
    except ValueError:
        return math.inf


def _focus(ax: Axes, bands: dict[str, Band], uniform: float | None) -> set[str]:
    """Cuts the picture above uniform where something far worse would squeeze what matters; who is cut off.

    Losses that uniform is a multiple of are drawn by factors.
    """
    drawn = {label: b for label, b in bands.items() if b.count and np.isfinite(b.middle).any()}
    best = min([float(np.nanmin(b.middle)) for b in drawn.values()], default=math.nan)
    if uniform is None or not best < uniform < math.inf:
        return set()
    lowest = min(float(np.nanmin(b.low)) for b in drawn.values())
    _, high = ax.get_ylim()
    if lowest > 0 and FACTOR * best < uniform < MOST * lowest:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if uniform < 20 * lowest else (1.0,)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    limit = uniform + 0.3 * (uniform - best)
    if high <= limit + 0.3 * (uniform - best):
        return set()
    ends = {label: b.middle[-1] for label, b in drawn.items()}
    highest = max([uniform, *(float(np.nanmax(b.high)) for label, b in drawn.items() if ends[label] <= limit)])
    ceiling = min(highest, limit)
    _set_limits(ax, lowest, ceiling, below=0.12, above=0.06)
    return {label for label, value in ends.items() if value > limit}


def _set_limits(ax: Axes, low: float, high: float, *, below: float, above: float) -> None:
    """What is drawn, with margins: shares of its height on the axis's own scale."""
    scale = ax.yaxis.get_transform()
    bottom, top = scale.transform([low, high])
    room = top - bottom
    ax.set_ylim(*scale.inverted().transform([bottom - below * room, top + above * room]))


def _bands(results: Results, problem: str, axis: str, labels: Sequence[str]) -> dict[str, Band]:
    found = {label: results.of(problem, label) for label in labels}
    return {k: band([curve(r, axis) for r in runs]) for k, runs in found.items() if runs[0].searcher != "uniform"}


def shown_labels(results: Results, problem: str, most: int = SHOWN) -> list[str]:
    """Searchers on a problem, best median first; where there are many, the best ``most`` and uniform."""
    losses = {label: [r.loss for r in results.of(problem, label)] for label in results.labels}
    order = sorted((label for label in losses if losses[label]), key=lambda label: float(np.median(losses[label])))
    uniform = [label for label in order if results.of(problem, label)[0].searcher == "uniform"]
    return [label for i, label in enumerate(order) if i < most or label in uniform]


def _draw(ax: Axes, b: Band, end: float, label: str, style: LineStyle) -> None:
    """A step line and its band, up to ``end`` if the searches have finished: who stopped early keeps its incumbent."""
    x = np.append(b.x, max(end, b.x[-1]) if b.finished else b.x[-1])
    middle, low, high = (np.append(v, v[-1]) for v in (b.middle, b.low, b.high))
    ax.fill_between(x, low, high, step="post", color=style.colour, alpha=0.15, linewidth=0)
    places = np.flatnonzero(np.diff(middle, prepend=np.nan) != 0)
    if len(places) > 12:
        places = places[:: len(places) // 12 + 1]
    ax.plot(
        x, middle, drawstyle="steps-post", color=style.colour, linestyle=style.dash, linewidth=1.9, label=label,
        marker=style.marker, markersize=5, markevery=[int(i) for i in places],
    )  # fmt: skip


def _references(ax: Axes, dense: float | None, optimum: float | None) -> None:
    """Dotted lines at the dense model and the optimum; only named where a line would squeeze the curves."""
    for value, name in ((dense, "dense model"), (optimum, "optimum")):
        if value is None:
            continue
        low, high = ax.get_ylim()
        bottom, place, top = ax.yaxis.get_transform().transform([low, value, high])
        if top - min(bottom, place) <= 1.5 * (top - bottom):
            ax.axhline(value, color=FAINT, dashes=(1, 2), linewidth=1.4)
            ax.plot([], [], color=FAINT, dashes=(1, 2), linewidth=1.4, label=f"{name}  {figure_text(value)}")
            _set_limits(ax, min(low, value), max(high, value), below=0.02 * (value < low), above=0.02 * (value > high))
        else:
            ax.annotate(
                f"{name}: {figure_text(value)}, below this picture", (0.01, 0.02), xycoords="axes fraction",
                fontsize=8.5, color=INK,
            )  # fmt: skip


def _title(results: Results, problem: str, bands: dict[str, Band]) -> str:
    counts = sorted({b.count for b in bands.values() if b.count})
    kinds = {b.kind for b in bands.values()}
    what = "95 % bootstrap interval of it" if "95 % bootstrap" in kinds else "least to greatest"
    seeds = "" if not counts or counts == [1] else f"median over {'-'.join(map(str, counts))} seeds, band: {what}"
    head = problem if len(results.problems) > 1 else results.name
    hidden = sum(bool(results.of(problem, label)) for label in results.labels) - len(bands) - 1
    rest = f"best {len(bands)} searchers" if hidden > 0 and len(bands) >= SHOWN - 1 else ""
    return literal("  ·  ".join(filter(None, [head, seeds, rest])))


def ecdf_figure(results: Results, problem: str, axis: str | None = None) -> Figure:
    """Share of (search, target) pairs met against what was spent; targets lie evenly from uniform to best known."""
    axis = axis or axes(results, problem)[0]
    losses = targets(results, problem)
    drawn, ax = figure(9.0, 4.2)
    clean(ax)
    styles = line_styles(results)
    curves = {
        label: [curve(r, axis) for r in results.of(problem, label) if r.checkpoints]
        for label in shown_labels(results, problem)
    }
    end = max((c.end for found in curves.values() for c in found), default=1.0)
    x = np.linspace(0, end, 400)
    shares = {label: attainment(found, losses, x) for label, found in curves.items() if found}
    for label, share in sorted(shares.items(), key=lambda item: -item[1][-1]):
        style = styles[label]
        ax.plot(
            x, share, drawstyle="steps-post", color=style.colour, linestyle=style.dash, linewidth=1.9,
            marker=style.marker, markevery=80, markersize=5, label=f"{literal(label)}  {share[-1]:.0%}",
        )  # fmt: skip
    ax.set_xlim(0, end * 1.005)
    ax.set_ylim(-0.02, 1.02)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    thousands(ax)
    ax.set_xlabel(KINDS[axis], color=INK)
    ax.set_ylabel("targets met, higher is better", color=INK)
    ax.set_title(f"{len(losses)} targets from uniform (or worst seen) to the best known loss", loc="left", fontsize=10)
    if shares:
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, title="at the end")
    return drawn


def cost_figure(results: Results, problem: str) -> Figure:
    """Where it went: tokens of gradients and by selection stage, seconds of model and searcher; means over searches."""
    labels = shown_labels(results, problem, 2 * SHOWN)
    charged = axes(results, problem)[0] == "tokens"
    drawn, (left, right) = figure(11.0, 1.3 + 0.36 * len(labels), ncols=2, sharey=True)
    stages = sorted({o.terms.stage for r in results.of(problem) for o in r.outcomes})
    shades = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
    names, start = [literal(label) for label in labels], np.zeros(len(labels))
    if charged and any(run.probes for run in results.of(problem)):
        start = np.array([_gradient_tokens(results, problem, label) for label in labels])
        left.barh(names, start, color=FAINT, label="gradients")
    for stage in stages:
        width = np.array([_stage_cost(results, problem, label, stage, charged) for label in labels])
        left.barh(names, width, left=start, color=shades[stage % len(shades)], label=f"stage {stage}")
        start += width
    model = np.array([np.mean([r.model_seconds for r in results.of(problem, label)]) for label in labels])
    own = np.array([_own_seconds(results, problem, label) for label in labels])
    right.barh(names, model, color="#0072B2", label="scoring (model)")
    right.barh(names, own, left=model, color="#D55E00", label="searcher itself")
    left.set_xlabel("tokens a search" if charged else "trials a search")
    right.set_xlabel("seconds a search")
    thousands(left)
    left.invert_yaxis()
    for ax in (left, right):
        clean(ax, grid="x")
        ax.legend(frameon=False, fontsize=8.5, ncols=5, loc="lower left", bbox_to_anchor=(0, 1.0))
    return drawn


def _stage_cost(results: Results, problem: str, label: str, stage: int, charged: bool) -> float:
    runs = results.of(problem, label)
    found = [o.tokens if charged else 1 for r in runs for o in r.outcomes if o.terms.stage == stage]
    return float(sum(found)) / len(runs)


def _gradient_tokens(results: Results, problem: str, label: str) -> float:
    runs = results.of(problem, label)
    return sum(measured.sensitivities.tokens for run in runs for _, measured in run.probes) / len(runs)


def _own_seconds(results: Results, problem: str, label: str) -> float:
    known = [r.searcher_seconds for r in results.of(problem, label) if not np.isnan(r.searcher_seconds)]
    return float(np.mean(known)) if known else 0.0
