"""Predicted memory of a search beside measured peaks, on random models of three sizes.

    python -m benchmarks.measurements.performance.footprint            # about five minutes, 3 GB of disk

Every evaluator runs in a process of its own, on one core; what is measured is the most that the process ever holds:
libraries and mapped files included. Needs the extra `dev` for a tokenizer.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from evo_hpo.levels.build import build
from evo_hpo.levels.store import LevelStore
from evo_hpo.models.loading import load_model
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.footprint import ModelShape, footprint
from evo_hpo.scoring.placement import KINDS
from evo_hpo.search.problem import Minibatch

SIZES = {"32M": (512, 8, 1408, 8192), "123M": (1024, 9, 2816, 8192), "362M": (1536, 12, 4096, 16384)}
"""Hidden size, blocks, size of the MLP, vocabulary."""
LEVELS = (2.0, 4.0, 8.0)
LENGTH, POOL, HELD_OUT = 256, 32, 8
GROUP = 128


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the models, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "MEMORY"), help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs="+", choices=KINDS, default=KINDS, help="how levels are held")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="of the models")
    options = parser.parse_args(arguments)
    if options.one:
        return _one(Path(options.one[0]), options.one[1])
    table = Table("model", "levels", "predicted, MB", "measured, MB", "predicted / measured")
    for name in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            _make(Path(folder), *SIZES[name])
            for memory in options.memory:
                command = [sys.executable, "-m", __spec__.name, "--one", folder, memory]
                measured = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
                predicted = footprint(
                    ModelShape.of(AutoConfig.from_pretrained(Path(folder) / "model")),
                    LEVELS,
                    memory=memory,
                    group_size=GROUP,
                    sequence_length=LENGTH,
                    calibration_tokens=POOL * LENGTH,
                    held_out_tokens=HELD_OUT * LENGTH,
                    on_cpu=True,
                ).total
                row = (f"{predicted / 1e6:.0f}", f"{measured / 1e6:.0f}", f"{predicted / measured:.2f}")
                table.add_row(f"{name}, bfloat16", memory, *row)
    Console().print(table)
    return None


def _make(folder: Path, hidden: int, blocks: int, wide: int, vocabulary: int) -> None:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=vocabulary,
        max_position_embeddings=LENGTH,
        dtype="bfloat16",
    )
    make: Any = AutoModelForCausalLM
    model = make.from_config(config)
    model.save_pretrained(folder / "model")
    del model
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "model")  # type: ignore[no-untyped-call]
    build(str(folder / "model"), folder / "store", method="rtn", levels=list(LEVELS), group_size=GROUP)


def _one(folder: Path, memory: str) -> None:
    torch.set_num_threads(1)
    loaded = load_model(str(folder / "model"), torch.bfloat16)
    store = LevelStore.open(folder / "store", torch.bfloat16, memory)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    pool, text = (torch.randint(0, 8192, (count, LENGTH), generator=generator) for count in (POOL, HELD_OUT))
    evaluator = Evaluator(loaded.model, store, pool, threads=1, stream=memory == "streamed")
    chosen, units = np.random.default_rng(0), len(store.units)
    evaluator.prepare()
    for level in range(len(LEVELS)):
        evaluator.score([(level,) * units], Minibatch(0, 4 * LENGTH))
    for seed in range(3):
        candidates = [tuple(row) for row in chosen.integers(0, len(LEVELS), (8, units)).tolist()]
        evaluator.score(candidates, Minibatch(seed, 2 * LENGTH))
    evaluator.evaluate_held_out(candidates[0], text)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    print(int(found[1]) * 1024)


if __name__ == "__main__":
    main()
