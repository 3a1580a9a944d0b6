"""Recorded losses against plain passes of transformers: `python -m benchmarks.measurements.landscapes.check pairs`.

Blocks are taken out of the model, or weights put into it; nothing of the evaluator takes part.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measurements.landscapes.record import LENGTH, MODEL, TOKENS
from benchmarks.problems.landscape import read
from evo_hpo.models.loading import LoadedModel, load_model
from evo_hpo.models.text import load_tokens
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.scoring.task import LanguageModelTask
from evo_hpo.search.problem import Minibatch


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the largest relative difference over randomly chosen rows of each landscape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("landscapes", nargs="+", choices=["pairs", "blocks", "bits"])
    parser.add_argument("--count", type=int, default=20, help="rows of each landscape")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    loaded = load_model(MODEL)
    for landscape in options.landscapes:
        arrays, tokens = read(landscape).arrays, TOKENS[landscape]
        text = load_tokens("pydoc", loaded.tokenizer, LENGTH, tokens, split="held_out")
        text = text[list(sequences_of(Minibatch(0, tokens), len(text), LENGTH))]
        dense = _log_probabilities(loaded.model, text)
        worst = 0.0
        rows = np.random.default_rng(0).choice(len(arrays["losses"]), options.count, replace=False)
        for row in rows:
            levels = arrays["levels" if landscape == "bits" else "kept"][row].tolist()
            model = _quantized(loaded, levels) if landscape == "bits" else _pruned(loaded.model, levels)
            other = _log_probabilities(model, text)
            losses = (dense.exp() * (dense - other)).sum(-1).mean(-1).numpy()
            worst = max(worst, float(np.abs(losses / arrays["losses"][row] - 1).max()))
        print(f"{landscape}: {options.count} rows, largest relative difference of a sequence's loss {worst:.1e}")


@torch.inference_mode()
def _log_probabilities(model: nn.Module, text: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=text, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits.double(), dim=-1)


def _pruned(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """A shallow copy of the model that has only the blocks of kept units."""
    found: Any = copy.copy(model)
    found._modules = dict(found._modules)
    body: Any = copy.copy(found.model)
    body._modules = dict(body._modules)
    size = len(body.layers) // len(kept)
    body.layers = nn.ModuleList(layer for i, layer in enumerate(body.layers) if kept[i // size])
    body.config = copy.copy(body.config)
    body.config.num_hidden_layers = len(body.layers)
    found.model = body
    return found  # type: ignore[no-any-return]


def _quantized(loaded: LoadedModel, levels: Sequence[int]) -> nn.Module:
    """A copy of the model with the weights of the levels."""
    store = LanguageModelTask(MODEL, build={"group_size": 64}).open_store(loaded.identity)
    found = copy.deepcopy(loaded.model)
    modules = dict(found.named_modules())
    for unit, level in enumerate(levels):
        for name, weight in store.weights(unit, level).items():
            assert weight is not None
            modules[name].weight.data = weight
    return found


if __name__ == "__main__":
    main()
