"""Golden values: one 1536x576 layer with correlated Gaussian inputs, our solvers beside the plain float64 ones.

python -m benchmarks.measurements.compression.golden           # the whole layer; the float64 oracle takes minutes
python -m benchmarks.measurements.compression.golden --rows 64 # the first rows only: the same inputs, seconds
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from benchmarks.measurements.compression import oracle
from evo_hpo.levels.factor import factorise, output_error
from evo_hpo.levels.gptq import gptq
from evo_hpo.levels.masks import parse_sparsities
from evo_hpo.levels.sparsegpt import sparsegpt

BITS = (2, 3, 4, 5, 6)
SPARSITIES = (0.3, 0.5, 0.7)


def layer(rows: int = 1536, columns: int = 576, tokens: int = 3072, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal weights, and H = X^T X of Gaussian inputs: 128 common factors and noise of a fifth of their size.

    Like the activations of a transformer, such inputs vary mostly in few directions.
    """
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(1536, columns))[:rows]
    loadings = rng.normal(size=(128, columns)) / 128**0.5
    inputs = rng.normal(size=(tokens, 128)) @ loadings + 0.2 * rng.normal(size=(tokens, columns))
    return torch.from_numpy(weight).float(), torch.from_numpy(inputs.T @ inputs).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1536)
    arguments = parser.parse_args()
    weight, hessian = layer(arguments.rows)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        factor = factorise(hessian)
        levels = gptq(weight, factor, BITS)
        seconds.append(time.perf_counter() - start)
    wide, square = weight.double().numpy(), hessian.double().numpy()
    shape, threads = tuple(weight.shape), torch.get_num_threads()
    print(f"{len(BITS)} GPTQ levels of {shape}: {min(seconds):.3f} s (best of 5), {threads} threads")
    print("| level | ours | float64 oracle |\n|---|---|---|")
    for bits, level in zip(BITS, levels, strict=True):
        theirs = _text(oracle.gptq(wide, square, bits, 64), wide, square)
        print(f"| {bits} bits | {output_error(weight, level.decode(), hessian):.4g} | {theirs} |")
    sparsities = parse_sparsities(SPARSITIES)
    for sparsity, (pruned, _) in zip(sparsities, sparsegpt(weight, factor, sparsities), strict=True):
        share = float(sparsity.share)
        theirs = _text(oracle.sparsegpt(wide, square, share), wide, square)
        print(f"| {sparsity.label} sparse | {output_error(weight, pruned, hessian):.4g} | {theirs} |")


def _text(compressed: oracle.Matrix, weight: oracle.Matrix, hessian: oracle.Matrix) -> str:
    return f"{oracle.relative_error(weight, compressed, hessian):.4g}"


if __name__ == "__main__":
    main()
