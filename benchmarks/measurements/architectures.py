"""Every causal architecture of transformers, tiny and random: our losses and folders beside plain transformers.

    python -m benchmarks.measurements.architectures [--table docs/architectures.md] [model type ...]

For each architecture that a tiny configuration builds: layers rounded to 3 and 4 bits, layers with half of their
weights removed, dropped attention and MLP modules, dropped blocks. Losses of the evaluator against
KL(dense || compressed) in float64 from a plain forward pass of a model with the weights replaced, or with the modules
really skipped; logits of the exported folder, loaded again, against those of that model.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measurements.tiny_architectures import (
    VARIANTS,
    VOCABULARY,
    architectures,
    other_inputs,
    tiny_architecture,
)
from evo_hpo.errors import EvoHpoError
from evo_hpo.export.folder import place
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.compressor import Compressor
from evo_hpo.levels.drop import build_drop_store
from evo_hpo.levels.pruners import Magnitude
from evo_hpo.levels.quantizers import GPTQ, RTN
from evo_hpo.levels.store import LevelStore, open_store
from evo_hpo.models.gates import GatedModel, example_tokens
from evo_hpo.models.loading import LoadedModel
from evo_hpo.models.structure import decoder_blocks, is_linear
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.search.problem import Minibatch

KINDS = ("quantized", "sparse", "parts", "blocks")
TOLERANCE = 1e-4
_SECONDS = 60.0
_LAYERS = 400
_BAR = "\\|"  # in a cell of a Markdown table
_REMEDY = re.compile(r"leave all such uncompressed with exclude = .*?--set '[^']*'")


@dataclass
class Examined:
    """What was found of one architecture: for each kind of level "ok", "refused: ..." or "WRONG: ..."."""

    name: str
    found: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """One word for the architecture."""
        words = [text.partition(":")[0] for text in self.found.values()]
        first = next((w for w in ("crash", "WRONG", "not built", "left out") if w in words), "")
        return first or ("ok" if set(words) == {"ok"} else "refused" if set(words) == {"refused"} else "in part")


def examine(name: str) -> Examined:
    """Builds the architecture and compares every kind of level with plain transformers."""
    row = Examined(name)
    if parts := other_inputs(name):
        row.found["all"] = f"left out: reads more than text ({parts})"
        return row
    try:
        model: Any = tiny_architecture(name)
        loaded = LoadedModel.from_model(copy.deepcopy(model), name=name)
        tokens = torch.from_numpy(_rng().integers(3, VOCABULARY, size=(4, 16)))
        with torch.inference_mode():
            dense = model(input_ids=tokens, use_cache=False).logits
    except Exception as error:
        row.found["all"] = f"not built: {_line(error)}"
        return row
    if (layers := sum(is_linear(part) for part in model.modules())) > _LAYERS:
        row.found["all"] = f"not built: {layers} linear layers, its configuration cannot be made small"
        return row
    if (refusal := _tried(lambda: _accepted(loaded.model))) != "ok":
        row.found["all"] = refusal
        return row
    makers: dict[str, Callable[[Path], Any]] = {
        "quantized": lambda folder: build_store(loaded, folder, _rtn()),
        "gptq": lambda folder: build_store(loaded, folder, GPTQ([3, 4], group_size=8), tokens, inputs="3"),
        "sparse": lambda folder: build_store(loaded, folder, Magnitude([0.0, 0.5])),
        "parts": lambda folder: build_drop_store(loaded, folder),
        "blocks": lambda folder: build_drop_store(loaded, folder, ("block",)),
    }
    for kind, make in makers.items():
        row.found[kind] = _tried(lambda k=kind, m=make: _compare(k, m, model, loaded, tokens, dense))  # type: ignore[misc]
    return row


def _rtn() -> Compressor:
    return RTN([3, 4], group_size=8)


def _accepted(model: nn.Module) -> str:
    GatedModel(model, example_tokens(model))
    return "ok"


def _compare(
    kind: str, make: Callable[[Path], Any], model: nn.Module, loaded: LoadedModel, tokens: Tensor, dense: Tensor
) -> str:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "store")
        store = open_store(Path(folder) / "store")
        evaluator = Evaluator(loaded.model, store, tokens, threads=1, dense_bits=32, batch_size=2)
        minibatch = Minibatch(0, tokens.numel())
        chosen = _assignments(kind, store)
        losses = [score.loss for score in evaluator.score(chosen, minibatch)]
        evaluator.close()
        worst = apart = 0.0
        for number, (assignment, loss) in enumerate(zip(chosen, losses, strict=True)):
            plain = _plain(kind, model, store, assignment, tokens)
            expected = _divergence(dense, plain)
            worst = max(worst, abs(loss - expected) / max(expected, 0.1))
            if number == 0:
                exported = _exported(loaded, store, assignment, Path(folder) / "model", tokens)
                apart = float((exported - plain).abs().max() / plain.abs().max())
    if not (worst <= TOLERANCE and apart <= TOLERANCE):
        return f"WRONG: losses apart by {worst:.2g} of their value, logits of the folder by {apart:.2g}"
    return "ok"


def _assignments(kind: str, store: LevelStore) -> list[tuple[int, ...]]:
    """A few random ones; of dropped modules also those that drop one whole block part by part."""
    rng, units = _rng(), store.units
    found = [tuple(int(x) for x in rng.integers(2, size=len(units))) for _ in range(2)]
    if kind in ("parts", "blocks"):
        found.append(tuple(int(i not in (2, 3)) if kind == "parts" else int(i != 1) for i in range(len(units))))
    return found


def _plain(kind: str, model: nn.Module, store: LevelStore, assignment: Sequence[int], tokens: Tensor) -> Tensor:
    """Logits of plain transformers: weights replaced, modules silenced, or blocks skipped; nothing of ours runs."""
    changed: Any = copy.deepcopy(model)
    members = {
        name: weight for unit, level in enumerate(assignment) for name, weight in store.weights(unit, level).items()
    }
    if kind in ("parts", "blocks"):
        blocks = decoder_blocks(changed)
        whole = {block: [m for m in members if m == block or m.startswith(f"{block}.")] for block in blocks}
        for name, block in blocks.items():
            dropped = whole[name]
            if name in dropped or (kind == "parts" and _is_all(block, [changed.get_submodule(m) for m in dropped])):
                block.register_forward_hook(_passes_on, with_kwargs=True)
                continue
            for member in dropped:
                _silence(changed.get_submodule(member))
    else:
        place_plainly(changed, members)
    with torch.inference_mode():
        logits: Tensor = changed(input_ids=tokens, use_cache=False).logits
    return logits


def place_plainly(model: nn.Module, weights: dict[str, Tensor | None]) -> None:
    """Replaces weights; those of experts row by row in the fused parameters of transformers."""
    modules = dict(model.named_modules())
    for name, weight in weights.items():
        assert weight is not None
        if name in modules:
            modules[name].weight.data = weight
            continue
        experts, number, part = name.rsplit(".", 2)
        _expert(modules[experts], int(number), part).copy_(weight)


def _expert(fused: nn.Module, number: int, part: str) -> Tensor:
    """The rows of one expert's gate, up or down projection in the fused parameters, outputs x inputs."""
    turned = getattr(fused, "is_transposed", False)
    parameters = dict(fused.named_parameters(recurse=False))
    both = "gate_up_proj" in parameters and part != "down_proj"
    weight = parameters["gate_up_proj" if both else part].data[number]
    weight = weight.T if turned else weight
    if not both:
        return weight
    if getattr(fused, "is_concatenated", True):
        return weight.chunk(2)[part == "up_proj"]
    return weight[part == "up_proj" :: 2]


def _is_all(block: nn.Module, dropped: Sequence[nn.Module]) -> bool:
    """Whether every matrix of a block is inside of the modules that are dropped."""
    inside = {id(p) for module in dropped for p in module.parameters()}
    return bool(dropped) and not any(p.dim() > 1 and id(p) not in inside for p in block.parameters())


def _passes_on(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _silence(module: nn.Module) -> None:
    """Every matrix multiplication inside of the module gives zeros, and a bias outside of them is zero."""
    for part in module.modules():
        fused = any(p.dim() == 3 for p in part.parameters(recurse=False))
        if is_linear(part) or fused:
            part.register_forward_hook(
                lambda _, __, output: torch.zeros_like(output) if torch.is_tensor(output) else None
            )
            continue
        for name, parameter in part.named_parameters(recurse=False):
            if name.endswith("bias"):
                parameter.data.zero_()


def _exported(
    loaded: LoadedModel, store: LevelStore, assignment: Sequence[int], folder: Path, tokens: Tensor
) -> Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = copy.deepcopy(loaded.model)
    place(model, store, assignment)
    model.save_pretrained(folder)
    auto: Any = AutoModelForCausalLM
    again = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits: Tensor = again(input_ids=tokens, use_cache=False).logits
    return logits


def _divergence(dense: Tensor, other: Tensor) -> float:
    log_p, log_q = (logits[:, :-1].double().log_softmax(-1) for logits in (dense, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def _rng() -> Any:
    import numpy as np

    return np.random.default_rng(0)


def _tried(work: Callable[[], str]) -> str:
    try:
        return work()
    except EvoHpoError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"crash: {_line(error)}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]


def _alone(name: str, answers: Any) -> None:
    import logging
    import warnings

    import transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    answers.put(examine(name).found)


def sweep(names: Sequence[str]) -> list[Examined]:
    """Each architecture in a process of its own, so that one that dies or hangs ends nothing else."""
    tiny_architecture("llama")  # what all of them import
    context = multiprocessing.get_context("fork")
    rows = []
    for name in names:
        answers: Any = context.Queue()
        process = context.Process(target=_alone, args=(name, answers))
        process.start()
        try:
            found = answers.get(timeout=_SECONDS)
        except Exception:
            found = {"all": f"crash: no answer in {_SECONDS:.0f} seconds"}
            process.kill()
        process.join()
        rows.append(Examined(name, found))
        print(
            f"{name:28} {rows[-1].verdict:10} {'; '.join(f'{k} {v}' for k, v in found.items() if v != 'ok')}",
            flush=True,
        )
    return rows


def table(rows: Sequence[Examined]) -> str:
    """The page's table and its counts, in Markdown."""
    columns = ("quantized", "gptq", "sparse", "parts", "blocks")
    counts = {word: sum(row.verdict == word for row in rows) for word in dict.fromkeys(row.verdict for row in rows)}
    lines = [
        f"transformers {version('transformers')}: {', '.join(f'{n} {word}' for word, n in counts.items())}.",
        "",
        "| architecture | rounded | GPTQ | sparse | modules dropped | blocks dropped | why not |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        whole = row.found.get("all", "")
        words = [(whole or row.found.get(column, "")).partition(":")[0] for column in columns]
        why = [text.partition(": ")[2] for text in (whole, *(row.found.get(c, "") for c in columns)) if ": " in text]
        told = _REMEDY.sub(
            "leave them uncompressed with an exclude that the message prints", "; ".join(dict.fromkeys(why))
        )
        lines.append(f"| {row.name} | {' | '.join(words)} | {told.replace('|', _BAR)} |")
    return "\n".join(lines) + "\n"


def write_table(page: Path, rows: Sequence[Examined]) -> None:
    """Puts the table below the page's own words, in place of the one that is there."""
    mark = "<!-- measured -->"
    words = page.read_text(encoding="utf-8").partition(mark)[0]
    page.write_text(f"{words}{mark}\n\n{table(rows)}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--table", type=Path)
    chosen = parser.parse_args()
    measured = sweep(chosen.names or [*architectures(), *VARIANTS])
    if chosen.table:
        write_table(chosen.table, measured)
