"""Seconds to switch every unit of a store to another level, for each way of keeping levels; and bytes on disk.

python -m benchmarks.measurements.compression.switching FOLDER
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn

from evo_hpo.levels.store import LevelStore, Memory, open_store


def switch_all(store: LevelStore, modules: list[nn.Linear], level: int) -> float:
    """Seconds to place one level of every unit."""
    start = time.perf_counter()
    for number, module in enumerate(modules):
        weight = next(iter(store.weights(number, level).values()))
        assert weight is not None
        module.weight.data = weight
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    store = open_store(arguments.folder)
    size = sum(record.size for record in store.manifest.units)
    stored = sum(record.bytes for record in store.manifest.units)
    levels = len(store.units[0].levels)
    print(f"{len(store.units)} units, {size} weights, {levels} levels: {stored / size:.3f} bytes a weight on disk")
    modules = [nn.Linear(u.shape[1], u.shape[0], bias=False, device="meta") for u in store.manifest.units]
    for module in modules:
        module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    print("| memory | open and preload, s | switch all units, ms |\n|---|---|---|")
    choices: list[Memory] = ["resident", "packed", 2 << 30]
    for memory in choices:
        start = time.perf_counter()
        store = open_store(arguments.folder, memory=memory)
        store.preload()
        ready = time.perf_counter() - start
        switch_all(store, modules, 0)
        seconds = min(switch_all(store, modules, level % levels) for level in range(1, 6))
        print(f"| {memory} | {ready:.1f} | {1000 * seconds:.2f} |")


if __name__ == "__main__":
    main()
