"""Tokens a second of exported GGUF files in llama.cpp against what a latency table predicts.

python -m benchmarks.measurements.performance.decoding TABLE.json PROFILE.json=FILE.gguf ... [--rounds 60]

Files take turns, so that what else runs on the machine slows all of them; of each the shortest
time counts, as in the table. With ``--turns`` the products of the table are timed again in the same turns, and a second
prediction is made of those: what is left then is no change of the machine since the table was measured.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import numpy as np

from evo_hpo.export.folder import task_of
from evo_hpo.export.ggml_kernels import Kernel
from evo_hpo.export.latency import READ, RUNS
from evo_hpo.export.llama_cpp import LlamaCpp, forget
from evo_hpo.export.llama_cpp_timing import SPAN, Decoding
from evo_hpo.record.profiles import open_profile
from evo_hpo.scoring.expected_levels import expected_levels
from evo_hpo.scoring.latency_table import LatencyTable, Layer, layer_of


def layers_in(profile: Path) -> list[Layer]:
    """The layers at the levels that a profile gives them."""
    data, _ = open_profile(profile)
    levels = expected_levels(task_of(data))
    chosen = (levels.units[i].levels.index(data["units"][u.name]) for i, u in enumerate(levels.units))
    return [layer_of(choice) for choice in levels.chosen(list(chosen)).values()]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", type=LatencyTable.read)
    parser.add_argument("files", nargs="+", metavar="PROFILE.json=FILE.gguf")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--turns", action="store_true", help="time the table's products again, in turns with the files")
    arguments = parser.parse_args()
    table: LatencyTable = arguments.table
    pairs = [(Path(profile), Path(file)) for profile, file in (pair.split("=") for pair in arguments.files)]
    layers = [layers_in(profile) for profile, _ in pairs]
    for _, path in pairs:
        forget(path)
    with contextlib.ExitStack() as stack:
        files = [
            Decoding(stack.enter_context(LlamaCpp(file, table.depth + SPAN + 1, table.threads)), table.depth)
            for _, file in pairs
        ]
        again = sorted({layer for found in layers for layer in found}) if arguments.turns else []
        kernels = {layer: stack.enter_context(Kernel(layer[:2], layer[2], table.threads, READ)) for layer in again}
        times: list[list[float]] = [[] for _ in files]
        fresh: dict[Layer, list[float]] = {layer: [] for layer in kernels}
        for _ in range(arguments.rounds):
            for layer, kernel in kernels.items():
                fresh[layer] += [kernel.nanoseconds() for _ in range(RUNS)][1:]
            for found, file in zip(times, files, strict=True):
                found += [file.nanoseconds() for _ in range(RUNS)][1:]
    now = {layer: min(found) for layer, found in fresh.items()}
    print("| file | bytes | predicted, ms | measured, ms | tokens/s | error | median, ms | of the same turns, ms |")
    print("|---|---|---|---|---|---|---|---|")
    for (_, path), own, found in zip(pairs, layers, times, strict=True):
        predicted = (table.rest + sum(table.times[layer] for layer in own)) / 1e6
        measured, middle = min(found) / 1e6, float(np.median(found)) / 1e6
        turns = f"{(table.rest + sum(now[layer] for layer in own)) / 1e6:.3f}" if now else ""
        error = f"{100 * (predicted / measured - 1):+.1f} %"
        cells = (f"{path.stat().st_size:,}", f"{predicted:.3f}", f"{measured:.3f}", f"{1000 / measured:.1f}", error)
        print(f"| {path.stem} | {' | '.join(cells)} | {middle:.3f} | {turns} |")


if __name__ == "__main__":
    main()
