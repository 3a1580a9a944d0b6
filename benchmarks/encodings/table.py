"""The table of measured encodings: median gap of each optimizer under each encoding, in Markdown.

python -m benchmarks.encodings.table results.jsonl --problem 60 --evaluations 1000
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

ORDER = ("repaired", "projection", "native", "keys", "penalty", "set_constraint", "sequential", "-")


def table(rows: list[dict[str, Any]]) -> str:
    """One line a searcher, one column an encoding: median gap over the seeds, lower is better; best in bold."""
    gaps: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    times: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if "gap" in row:
            more = ", ".join(f"{k}={v}" for k, v in row["settings"].items())
            name = row["searcher"] + (f" ({more})" if more else "")
            gaps[name][row["encoding"]].append(row["gap"])
            times[name].append(row["milliseconds"])
    columns = [e for e in ORDER if any(e in found for found in gaps.values())]
    lines = [f"| optimizer | {' | '.join(columns)} | ms a trial | seeds |", "|---" * (len(columns) + 3) + "|"]
    medians = {name: {e: statistics.median(g) for e, g in found.items()} for name, found in gaps.items()}
    for name, found in sorted(medians.items(), key=lambda item: min(item[1].values())):
        best = min(found.values())
        cells = [
            f"**{found[e]:.1f}**" if found.get(e) == best else f"{found[e]:.1f}" if e in found else "" for e in columns
        ]
        seeds = sorted({len(g) for g in gaps[name].values()})
        count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]}-{seeds[-1]}"
        lines.append(f"| `{name}` | {' | '.join(cells)} | {statistics.median(times[name]):.2g} | {count} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--problem", default="60")
    parser.add_argument("--evaluations", type=int, default=1000)
    arguments = parser.parse_args()
    rows = [json.loads(line) for path in arguments.results for line in path.read_text().splitlines()]
    chosen = [r for r in rows if r["problem"] == arguments.problem and r["evaluations"] == arguments.evaluations]
    print(table(chosen))


if __name__ == "__main__":
    main()
