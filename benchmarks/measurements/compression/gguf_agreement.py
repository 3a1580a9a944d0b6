"""Whether llama.cpp computes from an exported GGUF file what the search scored, and what its arithmetic adds.

python -m benchmarks.measurements.compression.gguf_agreement PROFILE.json FILE.gguf [--text pydoc] [--tokens 2048]

Perplexity, and KL from the uncompressed model in float32, of three on the same tokens: the profile's model here, which
is what the evaluator scores; the same with the inputs of its quantized layers rounded to 8 bits, as llama.cpp does
before it multiplies (blocks of 32, or of 256 for K- and I-quants, which share a scale); and llama.cpp with the file.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor, nn

from evo_hpo.export.figures import Estimate
from evo_hpo.export.folder import place, read_profile
from evo_hpo.export.llama_cpp import LlamaCpp
from evo_hpo.levels.ggml import block_size
from evo_hpo.models.structure import is_linear
from evo_hpo.models.text import load_tokens


def rounded(values: Tensor, kind: str) -> Tensor:
    """As llama.cpp rounds what it multiplies with blocks of a type."""
    if kind in ("F16", "BF16"):
        return values.to(torch.float16 if kind == "F16" else torch.bfloat16).to(values.dtype)
    large = block_size(kind) == 256
    blocks = values.view(*values.shape[:-1], -1, 256 if large else 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    whole = (blocks / scale.clamp_min(1e-30)).round()
    return (whole * (scale if large else scale.half().float())).view(values.shape)


def round_inputs(model: nn.Module, types: Mapping[str, str]) -> None:
    """Rounds the inputs of layers (name -> ggml type) in every pass to come."""
    for name, kind in types.items():

        def hook(_: nn.Module, args: tuple[Tensor], kind: str = kind) -> tuple[Tensor]:
            return (rounded(args[0], kind),)

        model.get_submodule(name).register_forward_pre_hook(hook)


def logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    """Sequence -> logits, tokens x vocabulary."""

    def logits(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(input_ids=ids[None], use_cache=False).logits[0].float()
            return found

    return logits


def figures(logits: Callable[[Tensor], Tensor], dense: Callable[[Tensor], Tensor], text: Tensor) -> tuple[float, float]:
    """Perplexity, and KL from the dense model in nats a token."""
    divergences, losses = [], []
    for ids in text:
        log_p, log_q = (torch.log_softmax(each(ids)[:-1].double(), -1) for each in (dense, logits))
        divergences.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
        losses.append(float(-log_q.gather(1, ids[1:, None]).mean()))
    return Estimate.of(losses).exp().mean, Estimate.of(divergences).mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    _, loaded, levels, assignment = read_profile(arguments.profile, torch.float32)
    text = load_tokens(arguments.text, loaded.tokenizer, 256, arguments.tokens, 0, "held_out")
    own = copy.deepcopy(loaded.model)
    place(own, levels, assignment)
    dense = logits_of(loaded.model)
    print("| | perplexity | KL to the uncompressed model, nats a token |\n|---|---|---|")
    print("| uncompressed | {:.3f} | {:.5f} |".format(*figures(dense, dense, text)), flush=True)
    print("| the evaluator's model | {:.3f} | {:.5f} |".format(*figures(logits_of(own), dense, text)), flush=True)
    inside = {name: choice for name, choice in levels.chosen(assignment).items() if is_linear(own.get_submodule(name))}
    held = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(arguments.file).tensors}
    head = held.get("output.weight", held["token_embd.weight"])
    round_inputs(own, {n: str(c.level.settings["type"]) for n, c in inside.items()} | {"lm_head": head})
    told = figures(logits_of(own), dense, text)
    print("| the same, inputs of layers in 8 bits | {:.3f} | {:.5f} |".format(*told), flush=True)
    with LlamaCpp(arguments.file, context=256, threads=torch.get_num_threads()) as program:
        told = figures(lambda ids: torch.from_numpy(program.logits(ids.tolist())), dense, text)
    print("| llama.cpp | {:.3f} | {:.5f} |".format(*told))


if __name__ == "__main__":
    main()
