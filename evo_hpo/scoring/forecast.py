"""How fast a task scores and what it holds, before anything is built: from a configuration and a short pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from evo_hpo.levels.grid import GridSettings
from evo_hpo.models.mixed import MIXED, matrix_dtype, mix, model_dtype
from evo_hpo.models.structure import linear_modules
from evo_hpo.record.environment import cores
from evo_hpo.scoring.dense import joined
from evo_hpo.scoring.divergence import divergences
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.footprint import ModelShape, configuration, footprint
from evo_hpo.scoring.replica import Replica
from evo_hpo.scoring.task import LanguageModelTask
from evo_hpo.scoring.tuning import own_seconds
from evo_hpo.space.unit import Unit

VOCABULARY = 4096
"""Most entries of the small model's vocabulary; the head's time is in proportion to it."""


@dataclass(frozen=True)
class Forecast:
    """What a search of a task will take.

    Attributes:
        rate: tokens a second, of one device or all cores.
        memory: bytes of one process that scores with them; None where levels have no sizes before they are built.
    """

    rate: float
    memory: int | None


def forecast(task: LanguageModelTask) -> Forecast:
    """Measures one block of the task's model, with random weights. Takes seconds.

    Raises:
        ModelError: the model is not found, or is none that transformers can build.
    """
    config = configuration(task.model)
    dtype = task.settled_dtype
    rate = scoring_rate(config, dtype, task.placement.main, task.sequence_length)
    if task.method == "ggml" or task.join:
        return Forecast(rate, None)
    on_cpu = task.placement.main == "cpu"
    texts = 1 if isinstance(task.held_out, str) else len(task.held_out)
    shape, build = ModelShape.of(config), task.build_settings
    if build.get("embedding") and not task.placement.streamed:  # else they wait beside the device
        shape = _with_outer(shape, tied=bool(config.get_text_config().tie_word_embeddings))
    needs = footprint(
        shape,
        task.levels or (1.0,),
        method=task.method,
        memory=task.memory,
        group_size=int(build.get("group_size", GridSettings.group_size) or 0) or shape.hidden,  # 0: a row
        number=matrix_dtype(dtype).itemsize,
        state_number=model_dtype(dtype).itemsize,
        sequence_length=task.sequence_length,
        calibration_tokens=task.calibration_tokens,
        held_out_tokens=task.held_out_tokens * texts,
        replicas=cores() if on_cpu else 1,
        on_cpu=on_cpu,
        compiled=task.compile and matrix_dtype(dtype) == torch.bfloat16,
    )
    return Forecast(rate, needs.total)


def _with_outer(shape: ModelShape, tied: bool) -> ModelShape:
    """With token embedding and head among the searched layers."""
    matrix = shape.vocabulary * shape.hidden
    return replace(shape, linear=shape.linear + (1 if tied else 2) * matrix, largest=max(shape.largest, matrix))


class _AsItIs:
    """One unit with one level: the weight that is there."""

    fingerprint = "none"

    def __init__(self, model: nn.Module) -> None:
        name, module = next(iter(linear_modules(model).items()))
        assert isinstance(module.weight, Tensor)
        self.units = (Unit(name, costs=(1,), size=module.weight.numel()),)

    def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
        return {}


def scoring_rate(config: Any, dtype: str, device: str = "cpu", length: int = 256) -> float:
    """Tokens a second that a device reads for one candidate, all of whose blocks run; of a CPU all cores, if idle.

    Prefixes that candidates share are not counted, nor is switching levels. Takes seconds.

    Args:
        config: of transformers.
        dtype: its name, or ``mixed``.
        length: tokens a sequence.
    """
    text = config.get_text_config()
    blocks, entries = text.num_hidden_layers, min(text.vocab_size, VOCABULARY)
    share = text.vocab_size / entries
    tokens = torch.randint(0, entries, (1, length), generator=torch.Generator().manual_seed(0))
    model = _one_block(config, entries, model_dtype(dtype))
    if dtype == MIXED:
        mix(model)
    evaluator = Evaluator(model.to(device), _AsItIs(model), tokens, threads=1)

    def measure(replica: Replica) -> float:
        ids = evaluator.tokens
        with torch.inference_mode():
            for _ in range(2):  # the second time weights are packed
                replica.place((0,), ids)
            final = replica.gated.final_hidden(ids)[0]
            hidden = [final[:, :-1].flatten(0, 1)] * (1 if replica.head.linear else replica.group)
            side = joined([replica.dense(ids, 16, 128)])
            body = own_seconds(lambda: replica.gated.final_hidden(ids), ids)
            head = own_seconds(lambda: divergences(replica.head, hidden, side), ids) / len(hidden)
        return float(body * blocks + head * share)

    seconds: float = evaluator.pool.map([measure])[0]
    evaluator.close()
    return (cores() if evaluator.device.type == "cpu" else 1) * length / seconds


def _one_block(config: Any, entries: int, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, entries, None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    make: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = make.from_config(small, dtype=dtype)
    return model.requires_grad_(False).eval()
