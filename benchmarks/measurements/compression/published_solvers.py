"""The golden layer through the solvers of two published libraries, beside ours: relative output errors.

The libraries pin other versions than ours, so they go into an environment of their own, without their dependencies
(nothing else of theirs is used; both solvers run on the CPU):

    python -m venv /tmp/solvers && /tmp/solvers/bin/pip install -e .
    /tmp/solvers/bin/pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.20.0 nvidia-modelopt==0.47.0 \\
        loguru nvidia-ml-py pulp omegaconf antlr4-python3-runtime==4.9.3
    /tmp/solvers/bin/python -m benchmarks.measurements.compression.published_solvers  # all 1536 rows, two minutes
    /tmp/solvers/bin/python -m benchmarks.measurements.compression.published_solvers --rows 64
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib import import_module

import torch
from torch import nn

from benchmarks.measurements.compression.golden import BITS, SPARSITIES, layer
from evo_hpo.levels.factor import factorise, output_error
from evo_hpo.levels.gptq import gptq
from evo_hpo.levels.masks import parse_sparsities
from evo_hpo.levels.sparsegpt import sparsegpt

GROUP = 64
DAMPING = 0.01

Solver = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def _grid(weight: torch.Tensor, bits: int) -> tuple[object, torch.Tensor, torch.Tensor]:
    """compressed-tensors' own arguments, scales and zero points: asymmetric integers, static groups."""
    quantization = import_module("compressed_tensors.quantization")
    helpers = import_module("compressed_tensors.quantization.utils")
    arguments = quantization.QuantizationArgs(
        num_bits=bits, type="int", symmetric=False, strategy="group", group_size=GROUP
    )
    groups = weight.view(len(weight), -1, GROUP)
    scale, zero = helpers.calculate_qparams(groups.amin(2), groups.amax(2), arguments)
    return arguments, scale, zero


def llmcompressor_gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int) -> torch.Tensor:
    """llmcompressor's GPTQ."""
    solver = import_module("llmcompressor.modifiers.gptq.gptq_quantize")
    arguments, scale, zero = _grid(weight, bits)
    batch = (weight.clone()[None], hessian.clone()[None], scale[None], zero[None])
    quantized: torch.Tensor = solver.quantize_weight(*batch, None, arguments, percdamp=DAMPING)[0][0]
    return quantized


def modelopt_gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int) -> torch.Tensor:
    """NVIDIA ModelOpt's GPTQ walk, on the same grid (its integer quantizers are symmetric)."""
    solver = import_module("modelopt.torch.quantization.utils.calib_utils")
    lifecycle = import_module("compressed_tensors.quantization")
    arguments, scale, zero = _grid(weight, bits)
    inverse = solver.compute_hessian_inverse(hessian, weight, DAMPING)
    result = weight.clone()
    solver.gptq_blockwise_update(result, inverse, 128, lambda w: lifecycle.fake_quantize(w, scale, zero, arguments))
    return result


def llmcompressor_sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, sparsity: float) -> torch.Tensor:
    """llmcompressor's SparseGPT."""
    solver = import_module("llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify")
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight.clone(), requires_grad=False)
    found = solver.sparsify_weight(module, {module: hessian.clone()}, sparsity, 0, 0, 128, DAMPING, False)
    pruned: torch.Tensor = found[1]
    return pruned


def timed(solve: Callable[[], torch.Tensor], weight: torch.Tensor, hessian: torch.Tensor) -> str:
    """Error and seconds of one solver."""
    start = time.perf_counter()
    result = solve()
    seconds = time.perf_counter() - start
    return f"{output_error(weight, result, hessian):.4g} ({seconds:.2f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1536)
    weight, hessian = layer(parser.parse_args().rows)
    start = time.perf_counter()
    factor = factorise(hessian, DAMPING)
    quantized = gptq(weight, factor, BITS)
    print(
        f"{tuple(weight.shape)}, {torch.get_num_threads()} threads; ours, all bits: {time.perf_counter() - start:.2f} s"
    )
    print("| level | ours | llmcompressor | modelopt |\n|---|---|---|---|")
    solvers: tuple[Solver, ...] = (llmcompressor_gptq, modelopt_gptq)
    for solver in solvers:
        solver(weight[:8], hessian, 4)  # imports
    for bits, level in zip(BITS, quantized, strict=True):
        theirs = [timed(lambda s=s, b=bits: s(weight, hessian, b), weight, hessian) for s in solvers]  # type: ignore[misc]
        print(
            f"| {bits} bits | {output_error(weight, level.decode(), hessian):.4g} | {' | '.join(theirs)} |", flush=True
        )
    levels = parse_sparsities(SPARSITIES)
    for sparsity, (pruned, _) in zip(levels, sparsegpt(weight, factor, levels), strict=True):
        share = float(sparsity.share)
        theirs = [timed(lambda s=share: llmcompressor_sparsegpt(weight, hessian, s), weight, hessian), "-"]  # type: ignore[misc]
        print(f"| {share} sparse | {output_error(weight, pruned, hessian):.4g} | {' | '.join(theirs)} |", flush=True)


if __name__ == "__main__":
    main()
