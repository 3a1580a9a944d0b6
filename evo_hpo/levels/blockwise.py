"""Building a level store: block by block through the model, every level of every layer, one layer's file at a time."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.levels.compressor import Compressor
from evo_hpo.levels.hessian import BlockCalls, InputStatistics, capture_calls, run_block
from evo_hpo.levels.layer_jobs import Begun, LayerJobs, SharedInputs, rows_by_columns, usable_devices
from evo_hpo.levels.manifest import Manifest, Recipe
from evo_hpo.levels.writing import StoreWriter
from evo_hpo.models.experts import fused_leftovers
from evo_hpo.models.gates import GatedModel, example_tokens, output_head
from evo_hpo.models.identity import tokens_identity
from evo_hpo.models.loading import LoadedModel
from evo_hpo.models.structure import ROUTERS, decoder_blocks, linear_modules, outer_matrices

_log = logging.getLogger("evo_hpo")

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
    device: str | Sequence[str] = "cpu",
    batch_tokens: int = 1024,
    text: Mapping[str, Any] | None = None,
    progress: BuildProgress | None = None,
) -> Manifest:
    """Compress every chosen linear layer of a model to every level and write the store.

    The model waits on the CPU; one block at a time is on the device. The model's own weights are unchanged afterwards.

    Args:
        device: or several, as "cuda:0,cuda:1" or a list of them. The calibration text runs on the first; a block's
            layers are compressed on all of them at the same time and, where "dense" inputs need no levels of the
            blocks before, while the text runs through the next block. Devices of one kind change no bit of the store.
        tokens: calibration tokens, sequences x length; not needed by data-free compressors.
        inputs: "dense" calibrates every block on the outputs of the uncompressed blocks before it; the label of a
            level calibrates sequentially, on the outputs of the blocks before it at that level.
        include, exclude: regular expressions over module names; of embedding and head only ``exclude`` counts.
        batch_tokens: tokens that run through a block together (1024 fit a CPU cache; more on accelerators).
        text: what the tokens are, for the plan.
    """
    outer = outer_matrices(loaded.model) if compressor.embedding else {}
    outer = {name: module for name, module in outer.items() if not (exclude and re.search(exclude, name))}
    chosen = _offered(compressor, {**outer, **linear_modules(loaded.model, include, exclude)})
    _refuse_leftovers(loaded.model, include, exclude)
    plan = Recipe(
        model=loaded.name,
        identity=dict(loaded.identity),
        method=compressor.name,
        settings=compressor.settings(),
        calibration=_calibration(compressor, tokens, inputs, text),
        units=tuple(chosen),
        resource=compressor.resource,
    )
    devices, writer = usable_devices(device), StoreWriter(folder, plan)
    if found := writer.whole():
        return found
    with writer, LayerJobs(compressor, writer, devices) as jobs:
        if found := writer.whole():  # by another process
            return found
        builder = _Builder(loaded.model, writer, compressor, chosen, inputs, devices[0], jobs)
        builder.progress = progress or (lambda done, total, what: None)
        if compressor.needs == "nothing":
            builder.without_data()
        else:
            assert tokens is not None
            builder.with_data(torch.split(tokens, max(1, batch_tokens // tokens.shape[1])))
        _tell_unreached(builder.unreached, len(chosen), exclude)
        return writer.finish()


def _offered(compressor: Compressor, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers that are offered levels; a warning says which levels fall out of which layers, and why.

    Raises:
        InvalidSettingError: none is offered any.
    """
    shapes = {name: tuple(rows_by_columns(module).shape) for name, module in modules.items()}
    without: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, shape in sorted(shapes.items(), key=lambda row: row[1][1]):
        missing = tuple(label for label in compressor.labels if label not in compressor.offered(*shape))
        if missing:
            without.setdefault((compressor.unfit(*shape), missing), []).append(name)
    for (why, missing), names in without.items():
        what = "stay as they are" if len(missing) == len(compressor.labels) else "have other levels"
        _log.warning(
            "%d of %d layers %s: %s of %s (such as %s)",
            *(len(names), len(shapes), what, why, ", ".join(missing), names[0]),
        )
    found = {name: module for name, module in modules.items() if compressor.offered(*shapes[name])}
    if not found:
        raise InvalidSettingError(
            f"no layer has rows that the blocks of {', '.join(compressor.labels)} divide: choose types with smaller"
            " blocks (Q8_0, Q5_0, Q4_0 and IQ4_NL have 32)"
        )
    return found


def _refuse_leftovers(model: nn.Module, include: str, exclude: str) -> None:
    """Weights that cannot be taken apart into matrices are never left out in silence.

    Raises:
        ModelError: naming them and the expression that leaves them out knowingly.
    """
    left = {
        name: size
        for name, size in fused_leftovers(model).items()
        if re.search(include, name) and not (exclude and re.search(exclude, name))
    }
    if left:
        name, size = next(iter(left.items()))
        raise ModelError(
            f"{name!r} ({size} weights) holds its matrices in a layout that is not supported: leave all such"
            f" uncompressed with {_excluding(left, exclude)}"
        )


def _tell_unreached(names: Sequence[str], of: int, exclude: str) -> None:
    """A warning where layers read none of the calibration text."""
    if names:
        _log.warning(
            "%d of %d layers (such as %s) are never called with the calibration text: their levels are made without"
            " data, and they take budget though they may do nothing. Leave them uncompressed with %s",
            *(len(names), of, names[0], _excluding(names, exclude)),
        )


def _excluding(names: Iterable[str], exclude: str) -> str:
    """How these are left out too, as it is typed."""
    wanted = exclude_also(names, exclude)
    return f"exclude = {toml_text(wanted)} under build in a plan, or --set {shlex.quote(f'exclude={wanted}')}"


def exclude_also(names: Iterable[str], exclude: str) -> str:
    """An expression that matches these names in every block and nothing else beside what `exclude` matches already."""
    parts = ([r"[0-9]+" if part.isdigit() else re.escape(part) for part in name.split(".")] for name in names)
    return "|".join(filter(None, [exclude, *dict.fromkeys(f"^{'[.]'.join(each)}$" for each in parts)]))


def toml_text(value: str) -> str:
    """As a TOML string: literal, so that backslashes stand for themselves, where it has no quote of its own."""
    return json.dumps(value) if "'" in value else f"'{value}'"


def _calibration(
    compressor: Compressor, tokens: torch.Tensor | None, inputs: str | None, text: Mapping[str, Any] | None
) -> dict[str, Any]:
    if compressor.needs == "nothing" or tokens is None:
        return {key: value for key, value in (text or {}).items() if key == "dtype"}
    shape = {"sequences": tokens.shape[0], "length": tokens.shape[1], "tokens": tokens_identity(tokens)}
    return {**shape, "inputs": inputs, **(text or {})}


class _Builder:
    def __init__(
        self,
        model: nn.Module,
        writer: StoreWriter,
        compressor: Compressor,
        chosen: Mapping[str, nn.Module],
        inputs: str | None,
        device: torch.device,
        jobs: LayerJobs,
    ) -> None:
        self.model, self.writer, self.compressor, self.chosen = model, writer, compressor, chosen
        self.sequential = None if inputs in (None, "dense") else inputs
        self.device, self.jobs = device, jobs
        self._begun: Begun = []  # of the block before, while its layers are compressed
        self.outer = {name: module for name, module in outer_matrices(model).items() if name in chosen}
        self.progress: BuildProgress = lambda done, total, what: None
        self.unreached: list[str] = []  # layers that read none of the text; experts may do so by chance
        self._finished = 0

    def without_data(self) -> None:
        missing = {name: module for name, module in self.chosen.items() if not self.writer.done(name)}
        self._finished = len(self.chosen) - len(missing)
        self._end(self.jobs.begin([(name, module, SharedInputs(name, None)) for name, module in missing.items()]))

    def with_data(self, batches: tuple[torch.Tensor, ...]) -> None:
        blocks = decoder_blocks(self.model)
        names = [f"{list(blocks)[-1]}." if name in self.outer else name for name in self.chosen]
        needed = max(i for i, block in enumerate(blocks) if any(name.startswith(f"{block}.") for name in names))
        self.progress(0, len(self.chosen), "reading the calibration text")
        calls = capture_calls(self.model, blocks, batches)
        for index, (block_name, block) in enumerate(list(blocks.items())[: needed + 1]):
            modules = {name: module for name, module in self.chosen.items() if name.startswith(f"{block_name}.")}
            block.to(self.device)
            try:
                self._block(block, index, modules, calls, last=index == needed)
            finally:
                block.to("cpu")
        self._end(self._begun)
        if missing := {name: module for name, module in self.outer.items() if not self.writer.done(name)}:
            self._compress_outer(missing, batches, calls)

    def _compress_outer(
        self, modules: Mapping[str, nn.Module], batches: Sequence[torch.Tensor], calls: Sequence[BlockCalls]
    ) -> None:
        """Embedding and head; the calls' hidden states are the last block's inputs."""
        gated, head = GatedModel(self.model, example_tokens(self.model)), output_head(self.model)
        sums = torch.zeros(())
        with torch.inference_mode():
            for ids, call in zip(batches, calls, strict=True):
                final, _ = gated.final_hidden(ids, len(gated) - 1, call.hidden)
                sums = sums + final.float().flatten(0, 1).square().sum(0)
        known = {name: sums if module.weight is head.weight else None for name, module in modules.items()}
        self._end(
            self.jobs.begin([(name, module, SharedInputs(name, known[name])) for name, module in modules.items()])
        )

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
            self.unreached += [n for n in missing if statistics.of(n) is None and ".experts." not in n]
            begun = self._begin(missing, statistics)
            if once and self.jobs.several:
                begun, self._begun = self._begun, begun
            self._end(begun)
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

    def _begin(self, modules: dict[str, nn.Module], statistics: InputStatistics) -> Begun:
        shared = {leader: SharedInputs(leader, statistics.of(leader)) for leader in map(statistics.leader, modules)}
        return self.jobs.begin([(name, m, shared[statistics.leader(name)]) for name, m in modules.items()])

    def _end(self, begun: Begun) -> None:
        """Waits for layers, in order, and counts them."""
        for name, written in begun:
            written()
            self._finished += 1
            self.progress(self._finished, len(self.chosen), name)

    def _set_level(self, modules: Mapping[str, nn.Module]) -> None:
        if self.sequential is None:
            return
        for name, module in modules.items():
            dense = module.weight
            assert isinstance(dense, torch.Tensor)
            dense.data = self.writer.decode(name, self.sequential, dense.dtype).to(dense.device)
