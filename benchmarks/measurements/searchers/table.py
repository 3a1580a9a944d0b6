"""Tables of what :mod:`benchmarks.measurements.searchers.measure` wrote, as Markdown.

    python -m benchmarks...searchers.table equal.jsonl                        # one column a problem
    python -m benchmarks...searchers.table equal.jsonl --show overview        # means over kinds and sizes of problems
    python -m benchmarks...searchers.table equal.jsonl --show encodings       # other libraries by encodings
    python -m benchmarks...searchers.table nevergrad.jsonl --show kinds       # the same, by kinds of optimizers
    python -m benchmarks...searchers.table equal.jsonl --show significance    # encodings against the best one
    python -m benchmarks...searchers.table hits.jsonl --show significance --searchers evopress --against evopress
    python -m benchmarks...searchers.table equal.jsonl --problems additive --searchers trust_region evopress
    python -m benchmarks...searchers.table hits.jsonl --show hits

Gap: 0 is the optimum, or the best loss that any searcher of the file found where no optimum is known; 100 is uniform
compression. Hits: runs that found the optimum. Medians over seeds, with the second lowest and second highest of them
(for 10 seeds, a 98 % interval of the median).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from searchers.foreign.nevergrad_adapter import encoding_rule

__all__ = ["encodings", "gaps", "hits", "kinds", "overview", "significance", "table"]

EXACT = 1e-9
EVERY = ("",)
"""Starts of the labels that are shown: all."""

Rows = list[dict[str, Any]]


def gaps(rows: Rows) -> dict[tuple[str, str], list[float]]:
    """Gaps by problem and searcher, in percent."""
    return defaultdict(list, {key: list(found.values()) for key, found in _by_seed(rows).items()})


def _by_seed(rows: Rows) -> dict[tuple[str, str], dict[int, float]]:
    best: dict[tuple[str, int], float] = defaultdict(lambda: math.inf)
    for row in rows:
        if row["loss"] is not None:
            key = (row["problem"], row["seed"])
            known = row["optimum"] if row["optimum"] is not None else row["loss"]
            best[key] = min(best[key], known)
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["loss"] is not None:
            reference = best[row["problem"], row["seed"]]
            gap = 100 * (row["loss"] - reference) / ((row["uniform"] - reference) or 1.0)
            found[row["problem"], row["searcher"]][row["seed"]] = 0.0 if gap < EXACT else gap
    return found


def _interval(values: list[float]) -> str:
    ordered = sorted(values)
    low, high = (ordered[1], ordered[-2]) if len(ordered) > 3 else (ordered[0], ordered[-1])
    return f"{np.median(ordered):.1f} ({low:.1f}–{high:.1f})"


def _of(rows: Rows, starts: tuple[str, ...]) -> Rows:
    return [r for r in rows if r["searcher"].startswith(starts)]


def table(rows: Rows, starts: tuple[str, ...] = EVERY) -> str:
    """Searchers by mean rank, one column a problem; hit rates where the optimum is known for all of its instances.

    Of searchers whose labels start so; the best known losses are those of all rows.
    """
    found, rows = gaps(rows), _of(rows, starts)
    problems = list(dict.fromkeys(r["problem"] for r in rows))
    searchers = list(dict.fromkeys(r["searcher"] for r in rows))
    known = {p: all(r["optimum"] is not None for r in rows if r["problem"] == p) for p in problems}
    medians = {(p, s): float(np.median(found[p, s])) for p in problems for s in searchers if found[p, s]}
    ranks = {s: _mean_rank(medians, s) for s in searchers if any((p, s) in medians for p in problems)}
    lines = ["| searcher | mean rank | " + " | ".join(problems) + " |", "|---|---|" + "---|" * len(problems)]
    for s in sorted(ranks, key=ranks.__getitem__):
        cells = []
        for p in problems:
            values = found[p, s]
            hits = f"{sum(v == 0 for v in values)}/{len(values)}, " if known[p] else ""
            cells.append(hits + _interval(values) if values else "–")
        lines.append(f"| {s} | {ranks[s]:.1f} | " + " | ".join(cells) + " |")
    seeds = {p: len({r["seed"] for r in rows if r["problem"] == p}) for p in problems}
    lines += ["", "Seeds: " + ", ".join(f"{p}: {n}" for p, n in seeds.items()) + "."]
    return "\n".join(lines)


def _mean_rank(medians: dict[tuple[str, str], float], searcher: str) -> float:
    """Mean over the problems that it was measured on; 1 is best, searchers that are level share a rank."""
    own = {problem: value for (problem, name), value in medians.items() if name == searcher}
    better = [sum(p == q and m < value - EXACT for (q, _), m in medians.items()) for p, value in own.items()]
    return 1 + float(np.mean(better))


def overview(rows: Rows, starts: tuple[str, ...] = EVERY) -> str:
    """Searchers by mean rank; means of the median gaps over the problems of one number of units, and of one kind.

    A searcher that was not measured on every problem of a column has no figure there, and no rank if it misses any.
    """
    found, rows = gaps(rows), _of(rows, starts)
    problems = list(dict.fromkeys(r["problem"] for r in rows))
    searchers = list(dict.fromkeys(r["searcher"] for r in rows if r["loss"] is not None))
    medians = {(p, s): float(np.median(found[p, s])) for p in problems for s in searchers if found[p, s]}
    whole = [s for s in searchers if all((p, s) in medians for p in problems)]
    compared = {(p, s): medians[p, s] for p in problems for s in whole}
    ranks = {s: _mean_rank(compared, s) for s in whole}
    sizes = sorted({part for p in problems for part in p.split() if part.isdigit()}, key=int)
    columns = {f"{size} units": [p for p in problems if size in p.split()] for size in sizes}
    columns |= {kind: [p for p in problems if p.split()[0] == kind] for kind in {p.split()[0]: None for p in problems}}
    lines = [f"| searcher | seeds | mean rank | {' | '.join(columns)} |", "|---" * (len(columns) + 3) + "|"]
    for s in sorted(searchers, key=lambda s: ranks.get(s, math.inf)):
        means = [
            f"{np.mean([medians[p, s] for p in chosen]):.1f}" if all((p, s) in medians for p in chosen) else ""
            for chosen in columns.values()
        ]
        rank = f"{ranks[s]:.1f}" if s in ranks else ""
        lines.append(f"| {s} | {_seeds(len(found[p, s]) for p in problems)} | {rank} | {' | '.join(means)} |")
    return "\n".join(lines)


def _seeds(counts: Iterable[int]) -> str:
    found = sorted({n for n in counts if n})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def hits(rows: Rows, starts: tuple[str, ...] = EVERY) -> str:
    """How many runs found the optimum, and the mean gap, by problem; only where the optimum is known."""
    rows = [r for r in rows if r["loss"] is not None and r["optimum"] is not None]
    found, rows = gaps(rows), _of(rows, starts)
    problems = list(dict.fromkeys(r["problem"] for r in rows))
    shares = {
        s: float(np.mean([np.mean([v == 0 for v in found[p, s]]) for p in problems if found[p, s]]))
        for s in dict.fromkeys(r["searcher"] for r in rows)
    }
    lines = [f"| searcher | {' | '.join(problems)} |", "|---" * (len(problems) + 1) + "|"]
    for s in sorted(shares, key=lambda s: -shares[s]):
        values = [found[p, s] for p in problems]
        cells = [f"{sum(x == 0 for x in v)} of {len(v)}, {np.mean(v):.1f}" if v else "" for v in values]
        lines.append(f"| {s} | {' | '.join(cells)} |")
    return "\n".join(lines)


def encodings(rows: Rows, starts: tuple[str, ...] = EVERY) -> str:
    """Optimizers by encodings: mean over the problems of the median gap over seeds; the best in bold.

    Only instances on which an optimizer was measured under all of its encodings count for it, so that a row compares
    like with like.
    """
    found = _by_encoding(rows, starts)
    columns = list(dict.fromkeys(encoding for means, _ in found.values() for encoding in means))
    lines = [f"| optimizer | {' | '.join(columns)} | problems |", "|---" * (len(columns) + 2) + "|"]
    for optimizer, (means, problems) in found.items():
        lines.append(f"| `{optimizer}` | {_best_in_bold(means, columns)} | {problems} |")
    return "\n".join(lines)


def kinds(rows: Rows, starts: tuple[str, ...] = EVERY) -> str:
    """Nevergrad's optimizers by the part of their name that decides their default encoding: means over the optimizers.

    Default: the optimizers whose default encoding is their best, or within a hundredth of the way to uniform of it.
    """
    named: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(dict)
    for optimizer, (means, _) in _by_encoding(rows, starts).items():
        named[encoding_rule(optimizer.removeprefix("nevergrad:"))][optimizer] = means
    columns = list(dict.fromkeys(e for found in named.values() for means in found.values() for e in means))
    lines = [
        f"| name contains | optimizers | {' | '.join(columns)} | default | best or level |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for (part, default), found in sorted(named.items(), key=lambda item: -len(item[1])):
        means = {e: float(np.mean([own[e] for own in found.values()])) for e in columns}
        level = sum(own[default] <= min(own.values()) + 1 for own in found.values())
        cells = f"{_best_in_bold(means, columns)} | `{default}` | {level} of {len(found)}"
        lines.append(f"| {part or 'none of these'} | {len(found)} | {cells} |")
    return "\n".join(lines)


def _by_encoding(rows: Rows, starts: tuple[str, ...]) -> dict[str, tuple[dict[str, float], int]]:
    """Optimizer -> encoding -> mean of the median gaps, and over how many problems."""
    found, rows = _by_seed(rows), _of(rows, starts)
    problems = list(dict.fromkeys(r["problem"] for r in rows))
    own: dict[str, list[str]] = defaultdict(list)
    for label in dict.fromkeys(r["searcher"] for r in rows if " / " in r["searcher"]):
        own[label.partition(" / ")[0]].append(label)
    result = {}
    for optimizer, labels in own.items():
        shared = {p: set.intersection(*({*found.get((p, s), ())} for s in labels)) for p in problems}
        shared = {p: seeds for p, seeds in shared.items() if seeds}
        if shared:
            medians = {s: [np.median([found[p, s][n] for n in seeds]) for p, seeds in shared.items()] for s in labels}
            result[optimizer] = {s.partition(" / ")[2]: float(np.mean(medians[s])) for s in labels}, len(shared)
    return result


def _best_in_bold(means: dict[str, float], columns: list[str]) -> str:
    best = min(means.values())
    cells = (
        "" if e not in means else f"**{means[e]:.1f}**" if means[e] == best else f"{means[e]:.1f}" for e in columns
    )
    return " | ".join(cells)


def significance(rows: Rows, starts: tuple[str, ...] = EVERY, against: str | None = None) -> str:
    """Searchers against one of them, over all pairs of problem and seed: runs that are better, worse, and p.

    The signed-rank test (Wilcoxon, with the level pairs left out) compares the gaps, the sign test counts which is
    better. Against: a label; None: for each optimizer of another library its own encoding of the least mean gap.
    """
    found = _by_seed(rows)
    labels = list(dict.fromkeys(r["searcher"] for r in _of(rows, starts)))
    best = {o: f"{o} / {min(means, key=means.__getitem__)}" for o, (means, _) in _by_encoding(rows, starts).items()}
    lines = [
        "| searcher | against | pairs | better | worse | signed-rank p | sign p |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in labels:
        other = against or best.get(label.partition(" / ")[0])
        if other is None or other == label:
            continue
        both = [
            (p, n) for p in dict.fromkeys(r["problem"] for r in rows) for n in found[p, label] if n in found[p, other]
        ]
        differences = np.array([found[p, label][n] - found[p, other][n] for p, n in both])
        better, worse = int((differences < -EXACT).sum()), int((differences > EXACT).sum())
        ranks = float(stats.wilcoxon(differences).pvalue) if better + worse else 1.0
        signs = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
        lines.append(f"| {label} | {other} | {len(both)} | {better} | {worse} | {ranks:.2g} | {signs:.2g} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+")
    shown = {
        "problems": table,
        "overview": overview,
        "hits": hits,
        "encodings": encodings,
        "kinds": kinds,
        "significance": significance,
    }
    parser.add_argument("--show", choices=shown, default="problems")
    parser.add_argument("--searchers", nargs="*", default=[""], metavar="START", help="labels that start so")
    parser.add_argument("--problems", nargs="*", default=[""], metavar="START", help="labels that start so")
    parser.add_argument(
        "--against", metavar="LABEL", help="of --show significance; by default the best encoding of each optimizer"
    )
    arguments = parser.parse_args()
    if arguments.against is not None and arguments.show != "significance":
        parser.error("--against belongs to --show significance")
    rows = [json.loads(line) for file in arguments.files for line in file.read_text().splitlines()]
    rows = [r for r in rows if r["problem"].startswith(tuple(arguments.problems))]
    if arguments.against is not None:
        print(significance(rows, tuple(arguments.searchers), arguments.against))
    else:
        print(shown[arguments.show](rows, tuple(arguments.searchers)))


if __name__ == "__main__":
    main()
