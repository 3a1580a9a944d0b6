"""What the evaluator is compared with: levels, offspring, the straightforward loop, the bare model, plain losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from evo_hpo.models.structure import linear_modules
from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit
from searchers.evopress.mutation import LevelSwitch, Uniforms, switch_counts

GROUP = 64


class RoundedLevels:
    """Round-to-nearest weights of every linear layer: stands for any store; how good they are does not matter here."""

    def __init__(self, model: nn.Module, bits: Sequence[int] = (2, 3, 4)) -> None:
        self.fingerprint = f"rounded to {bits} bits"
        weights = {name: module.get_parameter("weight").detach() for name, module in linear_modules(model).items()}
        self.units = [Unit(n, tuple(b * w.numel() for b in bits), size=w.numel()) for n, w in weights.items()]
        self._weights = [{k: {n: _rounded(w, b)} for k, b in enumerate(bits)} for n, w in weights.items()]

    def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
        """See :class:`evo_hpo.levels.levels.Levels`."""
        return self._weights[unit][level]

    def rounded_to(self, dtype: torch.dtype) -> None:
        """Rounds them once more, from the numbers of a model to those that a matrix product takes."""
        self._weights = [
            {k: {n: w.to(dtype) for n, w in ws.items()} for k, ws in unit.items()} for unit in self._weights
        ]

    def save(self, folder: Path) -> None:
        """One file a layer and level, as the straightforward loop reads them."""
        for unit, levels in enumerate(self._weights):
            for level, weights in levels.items():
                torch.save(next(iter(weights.values())), folder / f"{unit}.{level}.pt")


def _rounded(weight: Tensor, bits: int) -> Tensor:
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, GROUP if columns % GROUP == 0 else columns)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low).clamp_min(1e-8) / (2**bits - 1)
    rounded: Tensor = ((groups - low) / step).round().mul(step).add(low)
    return rounded.reshape(rows, columns).contiguous()


def offspring(units: Sequence[Unit], count: int, seed: int) -> tuple[Assignment, list[Assignment]]:
    """A parent 100 mutations from uniform, and different EvoPress offspring of it (level switches, size groups)."""
    space = CompressionSpace.from_average(units, 3)
    stream, switch, draw = Uniforms(np.random.default_rng(seed)), LevelSwitch(space), switch_counts("min_of_two", 3)
    parent = space.uniform()
    for _ in range(100):
        parent = switch(parent, stream, draw(stream)) or parent
    found: dict[Assignment, None] = {}
    while len(found) < count:
        child = switch(parent, stream, draw(stream))
        if child is not None and child != parent:
            found[child] = None
    return parent, list(found)


class Straightforward:
    """The plain way: batch 1, a model call, full logits to log-softmax, target logits kept, weights from files."""

    def __init__(self, model: nn.Module, units: Sequence[Unit], folder: Path, tokens: Tensor) -> None:
        self.model, self.folder, self.tokens = model, folder, tokens
        self._parameters = [model.get_submodule(unit.members[0]).get_parameter("weight") for unit in units]
        self._current: list[int | None] = [None] * len(units)
        with torch.inference_mode():
            self._targets = [model(input_ids=row[None], use_cache=False).logits for row in tokens]
        self._chosen: Sequence[int] = range(len(tokens))

    def choose(self, sequences: Sequence[int]) -> None:
        """The sequences that losses are of from now on."""
        self._chosen = sequences

    def load(self, assignment: Assignment) -> None:
        """Reads the weights of the units whose level changes."""
        for unit, level in enumerate(assignment):
            if self._current[unit] != level:
                weight = torch.load(self.folder / f"{unit}.{level}.pt", weights_only=True)
                parameter = self._parameters[unit]
                parameter.data = weight.to(parameter.device, parameter.dtype)
                self._current[unit] = level

    def loss(self, assignment: Assignment) -> float:
        """KL divergence, nats a token."""
        self.load(assignment)
        total = 0.0
        with torch.inference_mode():
            for sequence in self._chosen:
                logits = self.model(input_ids=self.tokens[sequence][None], use_cache=False).logits
                log_p = functional.log_softmax(self._targets[sequence][0, :-1].float(), dim=-1)
                log_q = functional.log_softmax(logits[0, :-1].float(), dim=-1)
                total += float(functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
        return total / (len(self._chosen) * (self.tokens.shape[1] - 1))


def bare(model: nn.Module, tokens: Tensor, batch_size: int) -> None:
    """Body and head once over the tokens, nothing done with the logits."""
    with torch.inference_mode():
        for rows in torch.split(tokens, batch_size):
            model(input_ids=rows, use_cache=False)


def plain_losses(dense: nn.Module, compressed: nn.Module, tokens: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """KL and perplexity from full logits; float64 is the yardstick that both ways can be held against."""
    divergence = entropy = 0.0
    with torch.inference_mode():
        for row in tokens:
            log_p, log_q = (
                functional.log_softmax(m(input_ids=row[None], use_cache=False).logits[0, :-1].to(dtype), dim=-1)
                for m in (dense, compressed)
            )
            divergence += float((log_p.exp() * (log_p - log_q)).sum(-1).double().mean())
            entropy -= float(log_q.gather(-1, row[1:, None]).double().mean())
    return divergence / len(tokens), float(np.exp(entropy / len(tokens)))
