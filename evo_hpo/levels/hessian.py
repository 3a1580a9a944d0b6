"""The calibration pass: block by block, one block's activations at a time, statistics of each linear layer's inputs.

Peak memory: the hidden states between two blocks (tokens x width), one block, and its H matrices (inputs^2 x 4 bytes,
one for all layers that read the same activations, such as q, k and v).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from evo_hpo.errors import ModelError


class _Enough(Exception):
    """Raised inside a forward pass once everything that was wanted has been seen."""


@dataclass
class BlockCalls:
    """One batch on its way through the model: the hidden states before the next block, and every block's arguments."""

    hidden: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


def capture_calls(
    model: nn.Module, blocks: Mapping[str, nn.Module], batches: Sequence[torch.Tensor]
) -> list[BlockCalls]:
    """Run only what comes before the first block, and record with which arguments the model calls each block.

    Args:
        batches: token ids, sequences x length each.
    """
    modules = list(blocks.values())
    returned = _returned(model, modules[0], batches[0][:1, :2])
    calls: list[BlockCalls] = []

    def record(*arguments: Any, **named: Any) -> Any:
        hidden = arguments[0] if arguments else named.pop("hidden_states")
        if len(calls[-1].arguments) == 0:
            calls[-1].hidden = hidden
        calls[-1].arguments.append((arguments[1:], named))
        if len(calls[-1].arguments) == len(modules):
            raise _Enough
        return (hidden, *[None] * (returned - 1)) if returned else hidden

    with _replaced_forward(modules, record), torch.inference_mode():
        for batch in batches:
            calls.append(BlockCalls(torch.empty(0)))
            with contextlib.suppress(_Enough):
                model(input_ids=batch.to(_device(model)), use_cache=False)
            if len(calls[-1].arguments) != len(modules):
                raise ModelError(f"{type(model).__name__} does not call each of its {len(modules)} blocks once")
    return calls


def run_block(
    block: nn.Module, index: int, calls: Sequence[BlockCalls], device: torch.device, *, keep: bool = True
) -> None:
    """Run one block over all batches on `device`; hidden states wait on the CPU in between.

    Args:
        keep: replace each batch's hidden states by the block's output; otherwise only the block's hooks matter.
    """
    with torch.inference_mode():
        for call in calls:
            arguments, named = _to(call.arguments[index], device)
            with contextlib.suppress(_Enough):
                output = block(call.hidden.to(device), *arguments, **named)
                if keep:
                    call.hidden = (output[0] if isinstance(output, tuple | list) else output).to(call.hidden.device)


class InputStatistics:
    """Sums over the inputs x of linear layers: H = sum of x x^T (inputs x inputs), or only its diagonal; float32.

    Layers that were given the very same tensor share one sum. Use as a context manager around `run_block`.

    Args:
        modules: name -> linear layer.
        diagonal: keep only sum of x^2.
        stop_early: end each forward pass as soon as every layer has seen its input (its output is not needed).
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, diagonal: bool = False, stop_early: bool = False) -> None:
        self._modules = modules
        self._diagonal = diagonal
        self._stop_early = stop_early
        self._sums: dict[str, torch.Tensor] = {}
        self._leader: dict[str, str] = {}
        self._seen: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []
        self.tokens: dict[str, int] = {}

    def __enter__(self) -> InputStatistics:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    def leader(self, name: str) -> str:
        """The layer whose sum this layer shares (itself, if it shares none)."""
        return self._leader.get(name, name)

    def of(self, name: str) -> torch.Tensor | None:
        """The sum for a layer; None if it never ran (an expert that no token was routed to)."""
        return self._sums.get(self.leader(name))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._add(name, arguments[0])

        return hook

    def _add(self, name: str, inputs: torch.Tensor) -> None:
        if name in self._seen:  # a new forward pass has begun
            self._seen.clear()
        if name not in self._leader:
            same = (other for other, tensor in self._seen.items() if tensor is inputs)
            self._leader[name] = next(same, name)
        self._seen[name] = inputs
        if self._leader[name] == name:
            flat = inputs.reshape(-1, inputs.shape[-1]).float()
            self.tokens[name] = self.tokens.get(name, 0) + len(flat)
            if self._diagonal:
                self._sums[name] = self._sums.get(name, torch.zeros(())) + flat.square().sum(0)
            elif name in self._sums:
                self._sums[name].addmm_(flat.T, flat)
            else:
                self._sums[name] = flat.T @ flat
        if self._stop_early and len(self._seen) == len(self._modules):
            self._seen.clear()
            raise _Enough


def _returned(model: nn.Module, block: nn.Module, ids: torch.Tensor) -> int:
    """How many values a block returns in a tuple (older architectures); 0: the hidden states alone."""
    found: list[int] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        found.append(len(output) if isinstance(output, tuple | list) else 0)
        raise _Enough

    handle = block.register_forward_hook(look)
    try:
        with torch.inference_mode(), contextlib.suppress(_Enough):
            model(input_ids=ids.to(_device(model)), use_cache=False)
    finally:
        handle.remove()
    return found[0] if found else 0


@contextlib.contextmanager
def _replaced_forward(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
