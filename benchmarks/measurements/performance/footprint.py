"""Predicted memory of a search beside measured peaks, on random models of three sizes.

    python -m benchmarks.measurements.performance.footprint            # about ten minutes, 10 GB of disk

Every evaluator runs in a process of its own; what is measured is the most that it holds above what it held before the
model was loaded. Needs the extra `dev` for a tokenizer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from evo_hpo.search.problem import Minibatch

SIZES = {"60M": (768, 8, 2048), "280M": (1536, 10, 4096), "640M": (2048, 14, 5632)}
LEVELS = (2.0, 4.0, 8.0)
LENGTH, POOL = 256, 32
GROUP = 128


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the models, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "MEMORY"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        return _one(Path(options.one[0]), options.one[1])
    table = Table("model", "levels", "predicted, MB", "measured, MB", "predicted / measured")
    for name, (hidden, blocks, wide) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            _make(Path(folder), hidden, blocks, wide)
            for memory in ("resident", "packed"):
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.measurements.performance.footprint",
                    "--one",
                    folder,
                    memory,
                ]
                measured = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
                shape = ModelShape.of(AutoConfig.from_pretrained(Path(folder) / "model"))
                predicted = footprint(
                    shape,
                    LEVELS,
                    memory=memory,
                    group_size=GROUP,
                    sequence_length=LENGTH,
                    calibration_tokens=POOL * LENGTH,
                    held_out_tokens=0,
                    batch_size=1,
                    chunk=(512, 1024),
                ).total
                row = (f"{predicted / 1e6:.0f}", f"{measured / 1e6:.0f}", f"{predicted / measured:.2f}")
                table.add_row(f"{name}, bfloat16", memory, *row)
    Console().print(table)
    return None


def _make(folder: Path, hidden: int, blocks: int, wide: int) -> None:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=4096,
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
    before, most, done = _held(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, _held())
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = load_model(str(folder / "model"), torch.bfloat16)
    store = LevelStore.open(folder / "store", torch.bfloat16, memory)  # type: ignore[arg-type]
    tokens = torch.randint(0, 4096, (POOL, LENGTH), generator=torch.Generator().manual_seed(0))
    evaluator = Evaluator(loaded.model, store, tokens, threads=1)
    evaluator.prepare()
    candidates = [tuple([k] * len(store.units)) for k in range(len(LEVELS))]
    candidates += [(*candidates[0][:-1], 1), (*candidates[0][:-1], 2)]
    for seed in range(2):
        evaluator.score(candidates, Minibatch(seed, 4 * LENGTH))
    done.set()
    watcher.join()
    print(most - before)


def _held() -> int:
    """Resident bytes of this process, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    main()
