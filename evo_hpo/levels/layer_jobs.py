"""Layers compressed one after the other, or on several devices at the same time, a thread for each.

What a layer becomes depends on its weight and its inputs alone: devices of one kind change no bit of a store.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import nn

from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.levels.compressor import Compressor, Inputs
from evo_hpo.levels.writing import StoreWriter
from evo_hpo.models.loading import refuse_non_finite
from evo_hpo.models.placing import devices_here
from evo_hpo.models.structure import is_transposed

Begun = list[tuple[str, Callable[[], None]]]
"""Names of layers, and what returns once a layer's file is written."""


class SharedInputs:
    """Statistics of what some layers read; copied to a device, and factorised there, when it first needs them.

    Args:
        name: of the first of them.
        sums: H, or its diagonal; None where nothing is known.
    """

    def __init__(self, name: str, sums: torch.Tensor | None) -> None:
        self._name, self._sums = name, sums
        self._on: dict[int, Inputs] = {}

    def on(self, number: int, device: torch.device, columns: int, compressor: Compressor) -> Inputs:
        """Those of the device with this number; threads with other numbers may ask at the same time.

        Raises:
            ModelError: the sums are not finite.
        """
        if number not in self._on:
            sums = None if self._sums is None else self._sums.to(device)
            if sums is not None and not bool(torch.isfinite(sums).all()):
                raise ModelError(
                    f"the inputs of {self._name!r} are not finite on the calibration text (values beyond the range of"
                    " the model's dtype): build with dtype=float32 or bfloat16"
                )
            settings = (compressor.damping, compressor.activation_order)
            self._on[number] = Inputs(sums, columns, *settings, device=device)
        return self._on[number]


@dataclass(frozen=True)
class _Job:
    name: str
    weight: torch.Tensor  # rows x columns
    transposed: bool
    inputs: SharedInputs

    @property
    def work(self) -> int:
        """Layers that take long go first, or the last one would keep all devices but one waiting."""
        return self.weight.numel() * self.weight.shape[1]


class LayerJobs:
    """Compresses layers and writes their files; a context, that leaves no thread behind.

    Args:
        devices: where layers are compressed; one: in the calling thread, when its result is asked for.
    """

    def __init__(self, compressor: Compressor, writer: StoreWriter, devices: Sequence[torch.device]) -> None:
        self._compressor, self._writer, self._devices = compressor, writer, devices
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(len(devices)):
            self._free.put(number)
        cores = torch.get_num_threads()  # sums over other numbers of them end in other bits
        start = partial(torch.set_num_threads, cores)
        self._threads = ThreadPoolExecutor(len(devices), "device", start) if len(devices) > 1 else None

    @property
    def several(self) -> bool:
        """Whether layers are compressed while the caller does something else."""
        return self._threads is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._threads:
            self._threads.shutdown(cancel_futures=True)

    def begin(self, layers: Sequence[tuple[str, nn.Module, SharedInputs]]) -> Begun:
        """Layers in the order in which they are given."""
        jobs = [_Job(name, rows_by_columns(module), is_transposed(module), inputs) for name, module, inputs in layers]
        if self._threads is None:
            return [(job.name, partial(self._run, job)) for job in jobs]
        begun = {job.name: self._threads.submit(self._run, job) for job in sorted(jobs, key=lambda job: -job.work)}
        return [(job.name, begun[job.name].result) for job in jobs]

    def _run(self, job: _Job) -> None:
        number = self._free.get()
        try:
            self._compress(job, number)
        finally:
            self._free.put(number)

    def _compress(self, job: _Job, number: int) -> None:
        device = self._devices[number]
        refuse_non_finite(f"{job.name}.weight", job.weight)
        inputs = job.inputs.on(number, device, job.weight.shape[1], self._compressor)
        levels = self._compressor.compress(job.weight.to(device), inputs)
        for level in levels:
            if not math.isfinite(level.error):
                raise ModelError(
                    f"level {level.label} of {job.name!r} is not finite: its weights or inputs are too large"
                )
        self._writer.write(job.name, tuple(job.weight.shape), job.transposed, levels)


def rows_by_columns(module: nn.Module) -> torch.Tensor:
    """The weight as outputs x inputs."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.data.T if is_transposed(module) else weight.data


def usable_devices(names: str | Sequence[str]) -> list[torch.device]:
    """The devices called `cpu`, `cuda`, `cuda:1`, `auto` (all GPUs, or the CPU), or several: `cuda:0,cuda:1`.

    Raises:
        InvalidSettingError: there is no such device here.
    """
    given = names.split(",") if isinstance(names, str) else names
    return [_usable(found) for name in given for found in devices_here(name.strip())]


def _usable(name: str) -> torch.device:
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        found = "cpu and cuda" if torch.cuda.is_available() else "only cpu"
        reason = str(error).strip().splitlines()[0]
        raise InvalidSettingError(f"device={name!r} cannot be used, this machine has {found} ({reason})") from error
