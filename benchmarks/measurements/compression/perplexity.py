"""Held-out perplexity of uniform levels: GPTQ and RTN bits, SparseGPT, Wanda and magnitude sparsity, dropped blocks.

python -m benchmarks.measurements.compression.perplexity build gptq            # one store (resumes where it stopped)
python -m benchmarks.measurements.compression.perplexity measure gptq          # one line of JSON for each level
python -m benchmarks.measurements.compression.perplexity table                 # Markdown from all lines measured so far
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measurements.compression.building import METHODS, MODEL
from evo_hpo.levels.build import build
from evo_hpo.levels.levels import Levels
from evo_hpo.levels.store import LevelStore, open_store
from evo_hpo.models.loading import load_model
from evo_hpo.models.structure import decoder_blocks
from evo_hpo.models.text import load_tokens


@torch.inference_mode()
def perplexity(model: Any, sequences: torch.Tensor, batch: int = 2) -> float:
    """exp of the mean next-token loss (nats); lower is better."""
    total = 0.0
    for ids in torch.split(sequences, batch):
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
        total += float(nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (sequences.shape[0] * (sequences.shape[1] - 1)))


def place(model: nn.Module, levels: Levels, level: int) -> None:
    """Give every linear unit the same level."""
    for number in range(len(levels.units)):
        for name, weight in levels.weights(number, level).items():
            if weight is not None:
                model.get_submodule(name).weight.data = weight


def uniform(store: LevelStore, model: nn.Module, sequences: torch.Tensor) -> Iterator[tuple[str, float]]:
    """(label, perplexity) of every level, for all units at once."""
    for level, label in enumerate(store.units[0].levels):
        place(model, store, level)
        yield label, perplexity(model, sequences)


@torch.inference_mode()
def block_influence(model: Any, sequences: torch.Tensor) -> list[float]:
    """1 - mean cosine between what enters and what leaves each block (Men et al., 2024, ShortGPT): low is redundant."""
    blocks = list(decoder_blocks(model).values())
    sums = [0.0] * len(blocks)

    def hook(number: int) -> Any:
        def add(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            leaving = output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(arguments[0].float(), leaving.float(), dim=-1)
            sums[number] += float((1 - cosine).sum())

        return add

    handles = [block.register_forward_hook(hook(number)) for number, block in enumerate(blocks)]
    try:
        for ids in torch.split(sequences, 2):
            model(input_ids=ids, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [total / sequences.numel() for total in sums]


def dropped(model: nn.Module, sequences: torch.Tensor, order: list[int]) -> Iterator[tuple[str, float]]:
    """(count, perplexity) after dropping the first 0, 1, ... blocks of `order`."""
    prefix = next(iter(decoder_blocks(model))).rpartition(".")[0]
    parent, _, attribute = prefix.rpartition(".")
    blocks = list(decoder_blocks(model).values())
    for count in range(len(order) + 1):
        kept = [block for number, block in enumerate(blocks) if number not in order[:count]]
        setattr(model.get_submodule(parent), attribute, nn.ModuleList(kept))
        config: Any = model.config
        config.num_hidden_layers = len(kept)
        yield str(count), perplexity(model, sequences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["build", "measure", "table"])
    parser.add_argument("method", nargs="?", choices=[*METHODS])
    parser.add_argument("--folder", type=Path, default=Path("build/perplexity"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--most", type=int, default=8, help="blocks to drop at most")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.part == "table":
        print(table(folder))
        return
    if arguments.part == "build":
        start = time.perf_counter()
        build(MODEL, folder / arguments.method, method=arguments.method, levels=METHODS[arguments.method])
        print(f"{arguments.method}: {time.perf_counter() - start:.1f} s")
        return
    loaded = load_model(MODEL)
    sequences = load_tokens("pydoc", loaded.tokenizer, arguments.length, arguments.tokens, split="held_out")
    if arguments.method == "drop":
        influence = block_influence(loaded.model, load_tokens("pydoc", loaded.tokenizer, arguments.length, 4096))
        order = sorted(range(len(influence)), key=influence.__getitem__)[: arguments.most]
        print("blocks by rising influence:", {number: round(influence[number], 4) for number in order}, flush=True)
        rows = dropped(loaded.model, sequences, order)
    else:
        rows = uniform(open_store(folder / arguments.method, memory="packed"), loaded.model, sequences)
    with (folder / "perplexity.jsonl").open("a") as file:
        for label, value in rows:
            line = json.dumps({"method": arguments.method, "level": label, "perplexity": round(value, 3)})
            print(line, flush=True)
            file.write(line + "\n")


def table(folder: Path) -> str:
    """Markdown: one row for each level, one column for each method that has it."""
    rows = [json.loads(line) for line in (folder / "perplexity.jsonl").read_text().splitlines()]
    found = {(row["method"], row["level"]): row["perplexity"] for row in rows}
    parts = []
    for title, methods in (
        ("bits", ("gptq", "rtn")),
        ("sparsity", ("sparsegpt", "wanda", "magnitude")),
        ("blocks dropped", ("drop",)),
    ):
        levels = list(dict.fromkeys(level for method, level in found if method in methods))
        if levels:
            parts.append(f"| {title} | " + " | ".join(methods) + " |\n|" + "---|" * (len(methods) + 1))
            for level in sorted(levels, key=float):
                values = [f"{found[m, level]:.2f}" if (m, level) in found else "-" for m in methods]
                parts.append(f"| {level} | " + " | ".join(values) + " |")
            parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
