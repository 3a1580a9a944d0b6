"""torch as a program whose latency is measured: dense products, and on the CPU its own ones of 8 and 4 bits.

There is no product for other levels: they run dense. Weights and inputs are bfloat16.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from evo_hpo.levels.level_set import Choice, LevelSet
from evo_hpo.models.loading import load_model
from evo_hpo.space.compression_space import Assignment

DTYPE = torch.bfloat16
GROUPS = (128, 64, 32)
"""Columns that may share a scale at 4 bits."""

SPAN = 32
"""Tokens that are decoded before it starts again."""


class _Dense(nn.Module):
    """A product with a dense matrix."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.weight)


class _Bits8(nn.Module):
    """8 bits a weight, a scale a row; what is in it is made up."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
        self.scale = torch.full((rows,), 1e-3, dtype=DTYPE)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        return torch._weight_int8pack_mm(flat, self.weight, self.scale).view(*inputs.shape[:-1], -1)


class _Bits4(nn.Module):
    """4 bits a weight, a scale and a zero point a group of columns; what is in it is made up."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.group = next(size for size in GROUPS if columns % size == 0)
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        self.weight = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
        self.scale = torch.full((columns // self.group, rows, 2), 1e-3, dtype=DTYPE)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        found = torch._weight_int4pack_mm_for_cpu(flat, self.weight, self.group, self.scale)
        return found.view(*inputs.shape[:-1], -1)


class _Nothing(nn.Module):
    """What a dropped layer gives."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.new_zeros(*inputs.shape[:-1], self.rows)


class TorchProgram:
    """Whole models are transformers', with these products in the place of their layers.

    Args:
        model: as in a plan.
        device: ``cpu`` or ``cuda``.
    """

    name = "torch"

    def __init__(self, model: str, threads: int = 1, device: str = "cpu") -> None:
        self.version = (
            f"{torch.__version__}, bfloat16{'' if device == 'cpu' else f' on {torch.cuda.get_device_name()}'}"
        )
        self.threads, self.device = threads, device
        self._model: Any = load_model(model, DTYPE, device).model
        self._layers: dict[tuple[str, str], nn.Module] = {}

    @contextlib.contextmanager
    def product(self, choice: Choice, read: int) -> Iterator[_Timed]:
        """Products with different matrices, one after the other."""
        rows, columns = choice.unit.shape
        made: list[nn.Module] = []
        while not made or len(made) * _bytes_of(made[0]) < read:
            made.append(self._made(choice, _numbers(rows, columns).to(self.device)))
        inputs = _numbers(1, columns).to(self.device)

        def run() -> None:
            for one in made:
                one(inputs)

        yield _Timed(self, run, len(made))

    @contextlib.contextmanager
    def model(self, levels: LevelSet, assignment: Assignment, depth: int) -> Iterator[_Timed]:
        """Models share the layers that they have in common, and take each other's place."""
        own = dict(self._model.named_modules())
        layers = {name: self._layer(name, choice) for name, choice in levels.chosen(assignment).items()}
        state: dict[str, Any] = {"left": 0}

        def decode(tokens: int) -> None:
            ids = torch.ones(1, tokens, dtype=torch.long, device=self.device)
            state["cache"] = self._model(ids, past_key_values=state["cache"], use_cache=True).past_key_values

        def ready() -> None:
            self._place(layers)
            if not state["left"]:
                state.update(left=SPAN, cache=None)
                if depth:
                    decode(depth)
            state["left"] -= 1

        try:
            yield _Timed(self, lambda: decode(1), 1, ready)
        finally:
            self._place({name: own[name] for name in layers})

    def _place(self, layers: Mapping[str, nn.Module]) -> None:
        for name, module in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self._model.get_submodule(parent), child, module)

    def _layer(self, name: str, choice: Choice) -> nn.Module:
        found = self._layers.get(key := (name, choice.level.label))
        if found is None:
            module = self._model.get_submodule(name)
            weight = module.weight.T if choice.unit.transposed else module.weight
            found = self._layers[key] = self._made(choice, weight)
        return found

    def _made(self, choice: Choice, dense: torch.Tensor) -> nn.Module:
        """A module that takes as long as a layer at a level."""
        rows, columns = choice.unit.shape
        if choice.level.settings.get("kind") == "dropped":
            return _Nothing(rows)
        bits = choice.level.settings.get("bits") if self.device == "cpu" else None
        if bits == 8:
            return _Bits8(rows, columns)
        if bits == 4 and columns % GROUPS[-1] == 0 and rows % 16 == 0:
            return _Bits4(rows, columns)
        return _Dense(dense)


class _Timed:
    """Runs with a program's threads."""

    def __init__(
        self, program: TorchProgram, run: Callable[[], None], count: int, ready: Callable[[], None] = lambda: None
    ) -> None:
        self._program, self._run, self._count, self._ready = program, run, count, ready

    def nanoseconds(self) -> float:
        """Of one of the things that a run does."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._program.threads)
        try:
            with torch.inference_mode():
                self._ready()
                start = self._now()
                self._run()
                return (self._now() - start) / self._count
        finally:
            torch.set_num_threads(before)

    def _now(self) -> int:
        if self._program.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter_ns()


def _numbers(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(DTYPE)


def _bytes_of(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.numel() * weight.element_size()
