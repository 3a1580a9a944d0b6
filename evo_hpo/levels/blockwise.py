"""Building a level store: block by block through the model, every level of every layer, one layer's file at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.levels.compressor import Compressor, Inputs
from evo_hpo.levels.hessian import BlockCalls, InputStatistics, capture_calls, run_block
from evo_hpo.levels.manifest import Manifest, Plan
from evo_hpo.levels.writing import StoreWriter
from evo_hpo.models.experts import fused_leftovers
from evo_hpo.models.loading import LoadedModel
from evo_hpo.models.structure import ROUTERS, decoder_blocks, is_transposed, linear_modules

__all__ = ["BuildProgress", "build_store"]

BuildProgress = Callable[[int, int, str], None]
"""Called with (layers done, layers in all, what is being worked on)."""


def build_store(
    loaded: LoadedModel,
    folder: Path,
    compressor: Compressor,
    tokens: torch.Tensor | None = None,
    *,
    inputs: str | None = None,
    include: str = ".",
    exclude: str = ROUTERS,
    device: str = "cpu",
    batch_tokens: int = 1024,
    text: Mapping[str, Any] | None = None,
    progress: BuildProgress | None = None,
) -> Manifest:
    """Compress every chosen linear layer of a model to every level and write the store.

    The model waits on the CPU; one block at a time is on `device`. The model's own weights are unchanged afterwards.

    Args:
        tokens: calibration tokens, sequences x length; not needed by data-free compressors.
        inputs: "dense" calibrates every block on the outputs of the uncompressed blocks before it; the label of a
            level calibrates sequentially, on the outputs of the blocks before it at that level.
        include, exclude: regular expressions over module names.
        batch_tokens: tokens that run through a block together (1024 fit a CPU cache; more on accelerators).
        text: what the tokens are, for the plan.
    """
    chosen = linear_modules(loaded.model, include, exclude)
    _refuse_leftovers(loaded.model, include, exclude)
    plan = Plan(
        model=loaded.name,
        model_fingerprint=loaded.fingerprint,
        method=compressor.name,
        settings=compressor.settings(),
        calibration=_calibration(compressor, tokens, inputs, text),
        units=tuple(chosen),
        resource=compressor.resource,
    )
    builder = _Builder(loaded.model, StoreWriter(folder, plan), compressor, chosen, inputs, usable_device(device))
    builder.progress = progress or (lambda done, total, what: None)
    if (folder / "manifest.json").is_file():
        return Manifest.read(folder)
    if compressor.needs == "nothing":
        builder.without_data()
    else:
        assert tokens is not None
        builder.with_data(torch.split(tokens, max(1, batch_tokens // tokens.shape[1])))
    return builder.writer.finish()


def usable_device(name: str) -> torch.device:
    """The device called `cpu`, `cuda`, `cuda:1`, ...

    Raises:
        InvalidSettingError: there is no such device here.
    """
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        found = "cpu and cuda" if torch.cuda.is_available() else "only cpu"
        reason = str(error).strip().splitlines()[0]
        raise InvalidSettingError(f"device={name!r} cannot be used, this machine has {found} ({reason})") from error


def _refuse_leftovers(model: nn.Module, include: str, exclude: str) -> None:
    """Weights that cannot be taken apart into matrices are never left out in silence.

    Raises:
        ModelError: naming them and the expression that leaves them out knowingly.
    """
    for name, size in fused_leftovers(model).items():
        if re.search(include, name) and not (exclude and re.search(exclude, name)):
            raise ModelError(
                f"{name!r} ({size} weights) holds its matrices in a layout that is not supported: leave them"
                f" uncompressed with exclude={_either(exclude, name.rpartition('.')[2])!r}"
            )


def _either(*expressions: str) -> str:
    return "|".join(expression for expression in expressions if expression)


def _calibration(
    compressor: Compressor, tokens: torch.Tensor | None, inputs: str | None, text: Mapping[str, Any] | None
) -> dict[str, Any]:
    if compressor.needs == "nothing" or tokens is None:
        return {}
    return {"sequences": tokens.shape[0], "length": tokens.shape[1], "inputs": inputs, **(text or {})}


class _Builder:
    def __init__(
        self,
        model: nn.Module,
        writer: StoreWriter,
        compressor: Compressor,
        chosen: Mapping[str, nn.Module],
        inputs: str | None,
        device: torch.device,
    ) -> None:
        self.model, self.writer, self.compressor, self.chosen = model, writer, compressor, chosen
        self.sequential = None if inputs in (None, "dense") else inputs
        self.device = device
        self.progress: BuildProgress = lambda done, total, what: None
        self._finished = 0

    def without_data(self) -> None:
        for name, module in self.chosen.items():
            if not self.writer.done(name):
                self._compress(name, module, None)
            self._count(name)

    def with_data(self, batches: tuple[torch.Tensor, ...]) -> None:
        blocks = decoder_blocks(self.model)
        needed = max(i for i, block in enumerate(blocks) if any(name.startswith(f"{block}.") for name in self.chosen))
        self.progress(0, len(self.chosen), "reading the calibration text")
        calls = capture_calls(self.model, blocks, batches)
        for index, (block_name, block) in enumerate(list(blocks.items())[: needed + 1]):
            modules = {name: module for name, module in self.chosen.items() if name.startswith(f"{block_name}.")}
            block.to(self.device)
            try:
                self._block(block, index, modules, calls, last=index == needed)
            finally:
                block.to("cpu")

    def _block(
        self, block: nn.Module, index: int, modules: dict[str, nn.Module], calls: list[BlockCalls], *, last: bool
    ) -> None:
        """Compress one block's layers, and move the hidden states on to the next block."""
        missing = {name: module for name, module in modules.items() if not self.writer.done(name)}
        onward = not last
        if missing:
            self.progress(self._finished, len(self.chosen), f"{next(iter(missing)).rsplit('.', 2)[0]}: inputs")
            once = self.sequential is None  # on dense inputs the same pass also yields the next block's inputs
            diagonal = self.compressor.needs == "diagonal"
            with InputStatistics(missing, diagonal=diagonal, stop_early=not (once and onward)) as statistics:
                run_block(block, index, calls, self.device, keep=once and onward)
            self._compress_all(missing, statistics)
            onward = onward and not once
        self._finished += len(modules) - len(missing)
        if onward:
            dense = {
                name: module.weight.data for name, module in modules.items() if isinstance(module.weight, nn.Parameter)
            }
            try:
                self._set_level(modules)
                run_block(block, index, calls, self.device)
            finally:
                for name, weight in dense.items():
                    modules[name].weight.data = weight

    def _compress_all(self, modules: dict[str, nn.Module], statistics: InputStatistics) -> None:
        shared: dict[str, Inputs] = {}
        for name, module in modules.items():
            leader = statistics.leader(name)
            if leader not in shared:
                shared[leader] = self._inputs(statistics.of(name), module)
            self._compress(name, module, shared[leader])
            self._count(name)

    def _inputs(self, sums: torch.Tensor | None, module: nn.Module) -> Inputs:
        weight = _rows_by_columns(module)
        settings = (self.compressor.damping, self.compressor.activation_order)
        return Inputs(sums, weight.shape[1], *settings, device=weight.device)

    def _compress(self, name: str, module: nn.Module, inputs: Inputs | None) -> None:
        weight = _rows_by_columns(module)
        levels = self.compressor.compress(weight, inputs or self._inputs(None, module))
        self.writer.write(name, tuple(weight.shape), is_transposed(module), levels)

    def _set_level(self, modules: Mapping[str, nn.Module]) -> None:
        if self.sequential is None:
            return
        for name, module in modules.items():
            dense = module.weight
            assert isinstance(dense, torch.Tensor)
            dense.data = self.writer.decode(name, self.sequential, dense.dtype).to(dense.device)

    def _count(self, name: str) -> None:
        self._finished += 1
        self.progress(self._finished, len(self.chosen), name)


def _rows_by_columns(module: nn.Module) -> torch.Tensor:
    """The weight as outputs x inputs."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.data.T if is_transposed(module) else weight.data
