"""Tables of what :mod:`benchmarks.searchers.measure` wrote, as Markdown.

    python -m benchmarks.searchers.table equal.jsonl
    python -m benchmarks.searchers.table encodings.jsonl --encodings

Gap: 0 is the optimum, or the best loss that any searcher of the file found where no optimum is known; 100 is uniform
compression. Hits: runs that found the optimum. Medians over seeds, with the second lowest and second highest of them
(for 10 seeds, a 98 % interval of the median).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["encodings", "gaps", "table"]

EXACT = 1e-9


def gaps(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """Gaps by problem and searcher, in percent, only of instances that a reference is known for."""
    best: dict[tuple[str, int], float] = defaultdict(lambda: math.inf)
    for row in rows:
        if row["loss"] is not None:
            key = (row["problem"], row["seed"])
            known = row["optimum"] if row["optimum"] is not None else row["loss"]
            best[key] = min(best[key], known)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if row["loss"] is not None:
            reference = best[row["problem"], row["seed"]]
            gap = 100 * (row["loss"] - reference) / (row["uniform"] - reference)
            found[row["problem"], row["searcher"]].append(0.0 if gap < EXACT else gap)
    return found


def _interval(values: list[float]) -> str:
    ordered = sorted(values)
    low, high = (ordered[1], ordered[-2]) if len(ordered) > 3 else (ordered[0], ordered[-1])
    return f"{np.median(ordered):.1f} ({low:.1f}–{high:.1f})"


def table(rows: list[dict[str, Any]]) -> str:
    """Searchers by mean rank, one column a problem; hit rates where the optimum is known for all of its instances."""
    found = gaps(rows)
    problems = list(dict.fromkeys(r["problem"] for r in rows))
    searchers = list(dict.fromkeys(r["searcher"] for r in rows))
    known = {p: all(r["optimum"] is not None for r in rows if r["problem"] == p) for p in problems}
    medians = {(p, s): float(np.median(found[p, s])) for p in problems for s in searchers if found[p, s]}
    ranks = {
        s: float(
            np.mean(
                [
                    sorted(medians[p, o] for o in searchers if (p, o) in medians).index(medians[p, s]) + 1
                    for p in problems
                    if (p, s) in medians
                ]
            )
        )
        for s in searchers
        if any((p, s) in medians for p in problems)
    }
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


def encodings(rows: list[dict[str, Any]]) -> str:
    """Optimizers by encodings: mean over the problems of the median gap over seeds; the best in bold.

    Only problems on which an optimizer was measured under all of its encodings count for it, so that a row compares
    like with like.
    """
    found = gaps(rows)
    named = [s for s in dict.fromkeys(r["searcher"] for r in rows) if " / " in s]
    columns = list(dict.fromkeys(s.partition(" / ")[2] for s in named))
    lines = [f"| optimizer | {' | '.join(columns)} | problems |", "|---" * (len(columns) + 2) + "|"]
    for optimizer in dict.fromkeys(s.partition(" / ")[0] for s in named):
        own = [s for s in named if s.partition(" / ")[0] == optimizer]
        problems = [p for p in dict.fromkeys(r["problem"] for r in rows) if all(found.get((p, s)) for s in own)]
        if not problems:
            continue
        means = {s.partition(" / ")[2]: float(np.mean([np.median(found[p, s]) for p in problems])) for s in own}
        best = min(means.values())
        cells = [
            "" if e not in means else f"**{means[e]:.1f}**" if means[e] == best else f"{means[e]:.1f}" for e in columns
        ]
        lines.append(f"| `{optimizer}` | {' | '.join(cells)} | {len(problems)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--encodings", action="store_true", help="optimizers by encodings, over all problems")
    arguments = parser.parse_args()
    rows = [json.loads(line) for file in arguments.files for line in file.read_text().splitlines()]
    print(encodings(rows) if arguments.encodings else table(rows))


if __name__ == "__main__":
    main()
