"""Whether llama.cpp computes from an exported GGUF file what the search scored, and what its arithmetic adds.

python -m benchmarks.measurements.compression.gguf_agreement PROFILE.json FILE.gguf [--texts pydoc ...] [--tokens 2048]

Perplexity, and KL from the uncompressed model in float32, on the same tokens: the evaluator's, without and with
``arithmetic = "llama.cpp"``, and llama.cpp's with the file; how far the evaluator's KL is from llama.cpp's, with its
95 % interval over sequences, and processor seconds of the evaluator's passes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evo_hpo.export.figures import Estimate
from evo_hpo.export.folder import read_profile
from evo_hpo.export.llama_cpp import LlamaCpp
from evo_hpo.models.loading import source_gguf
from evo_hpo.models.text import load_tokens
from evo_hpo.scoring.arithmetic import InputTypes
from evo_hpo.scoring.evaluator import Evaluator


def logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    """Sequence -> logits, tokens x vocabulary."""

    def logits(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(input_ids=ids[None], use_cache=False).logits[0].float()
            return found

    return logits


Figures = tuple[list[float], list[float]]
"""KL from the uncompressed model and cross-entropy of each sequence, nats a token."""


def figures(logits: Callable[[Tensor], Tensor], dense: Callable[[Tensor], Tensor], text: Tensor) -> Figures:
    """Of whatever gives logits."""
    divergences, losses = [], []
    for ids in text:
        log_p, log_q = (torch.log_softmax(each(ids)[:-1].double(), -1) for each in (dense, logits))
        divergences.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
        losses.append(float(-log_q.gather(1, ids[1:, None]).mean()))
    return divergences, losses


def row(text: str, what: str, found: Figures, wanted: Figures | None = None, seconds: float | None = None) -> str:
    """A line of the table."""
    divergences, losses = found
    told = [f"{Estimate.of(losses).exp().mean:.3f}", f"{Estimate.of(divergences).mean:.5f}", "", ""]
    if wanted is not None:
        apart = Estimate.of([a - b for a, b in zip(divergences, wanted[0], strict=True)])
        told[2] = f"{apart.mean:+.5f} ± {apart.high - apart.mean:.5f}"
    if seconds is not None:
        told[3] = f"{seconds:.1f}"
    return f"| {' | '.join([text, what, *told])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--texts", nargs="+", default=["pydoc", "encyclopedia"])
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    _, loaded, levels, assignment = read_profile(arguments.profile, torch.float32)
    threads = torch.get_num_threads()
    print("| text | | perplexity | KL, nats a token | from llama.cpp | seconds |\n|---|---|---|---|---|---|")
    for name in arguments.texts:
        text = load_tokens(name, loaded.tokenizer, 256, arguments.tokens, 0, "held_out", apart_from=["pydoc"])
        with LlamaCpp(arguments.file, context=256, threads=threads) as program:

            def logits(ids: Tensor, program: LlamaCpp = program) -> Tensor:
                return torch.from_numpy(program.logits(ids.tolist()))

            wanted = figures(logits, logits_of(loaded.model), text)
        print(row(name, "llama.cpp", wanted), flush=True)
        for what, inputs in (
            ('`arithmetic = "llama.cpp"`', InputTypes.of(source_gguf(loaded.name), loaded.model, levels)),
            ("inputs as they come", None),
        ):
            evaluator = Evaluator(loaded.model, levels, text, threads=threads, inputs=inputs)
            evaluator.evaluate_held_out(None, text)  # what is kept of the uncompressed model is made then
            start = time.process_time()
            found = evaluator.evaluate_held_out(assignment, text)
            seconds = time.process_time() - start
            print(row(name, what, (found["losses"], found["cross_entropies"]), wanted, seconds), flush=True)


if __name__ == "__main__":
    main()
