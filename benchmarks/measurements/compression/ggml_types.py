"""How fast llama.cpp quantizes to each ggml type and decodes it, and with what error.

python -m benchmarks.measurements.compression.ggml_types [--rows 768] [--types Q4_K Q8_0 ...]

Standard normal weights, 1536 columns of random importance. Processor seconds, so that a busy machine changes little;
the tables that some types need are made before the clock starts, and have a column of their own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from evo_hpo.levels.ggml import GGML_TYPES, block_size, dequantize, quantize, row_bytes

COLUMNS = 1536


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def row(name: str, rows: int) -> str:
    """One row of the table."""
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((rows, COLUMNS)).astype(np.float32))
    importance = torch.from_numpy(rng.random(COLUMNS).astype(np.float32) + 0.1)
    tables = seconds(lambda: quantize(weight[:1], name, importance))
    encode = seconds(lambda: quantize(weight, name, importance))
    blocks = quantize(weight, name, importance)
    decode = seconds(lambda: dequantize(blocks, name))
    difference = (dequantize(blocks, name) - weight).square() * importance
    error = float(difference.sum() / (weight.square() * importance).sum())
    millions = weight.numel() / 1e6
    cells = (name, f"{8 * row_bytes(name, COLUMNS) / COLUMNS:.4g}", str(block_size(name)), f"{error:.3g}")
    speeds = (f"{millions / encode:.1f}", f"{millions / max(decode, 1e-4):.0f}", f"{tables:.1f}")
    return f"| {' | '.join((*cells, *speeds))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--types", nargs="*", default=list(GGML_TYPES))
    arguments = parser.parse_args()
    print("| type | bits a weight | block | error | encoded, M weights/s | decoded, M weights/s | tables, s |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.types:
        print(row(name, arguments.rows), flush=True)


if __name__ == "__main__":
    main()
