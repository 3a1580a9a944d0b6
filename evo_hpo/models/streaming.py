"""Decoder blocks that wait in main memory: the weights of each come to the device for its turn, the next ones before.

On a GPU what waits is pinned and copied by a stream of its own (docs/evaluator.md: how fast that is).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

Source = Callable[[torch.device], Tensor]
"""Makes a weight on a device."""

Ready = tuple[list[tuple[nn.Parameter, Tensor]], Any]


class BlockStream:
    """The blocks of one replica and where their weights come from.

    Args:
        blocks: in running order, on the CPU; their buffers move to the device for good.
        device: where they run.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._parameters = [list(dict.fromkeys(block.parameters())) for block in blocks]
        gpu: Any = torch.cuda
        self._copies = gpu.Stream(self.device) if self.device.type == "cuda" and gpu.is_available() else None
        self._waiting: dict[nn.Parameter, Tensor] = {}
        for block in blocks:
            for module in block.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(self.device))
            for parameter in block.parameters():
                self._waiting[parameter] = parameter.data
        self._sources: dict[nn.Parameter, Source] = {}
        self._depth = [0] * len(blocks)
        self._ahead: dict[int, Future[Ready]] = {}
        self._last = -1
        self._ended: Any = None  # event of a GPU: the last turn's work is done
        self._thread = ThreadPoolExecutor(1, "prefetch", initializer=lambda: torch.set_num_threads(1))

    def brings(self, module: nn.Module) -> bool:
        """Whether a module's weight is one of the blocks'."""
        return isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight in self._waiting

    def give(self, parameter: nn.Parameter, source: Source | None) -> None:
        """What a parameter of the blocks holds in its next turns; None: its own weight."""
        if source is None:
            self._sources.pop(parameter, None)
        else:
            self._sources[parameter] = source
        self._ahead.clear()

    def wrapped(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward that takes its turn."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.turn(number):
                return forward(*args, **kwargs)

        return run

    @contextlib.contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """While it lasts, a block's weights are on the device; turns of the same block may lie in each other."""
        if self._depth[number] == 0:
            self._bring(number)
        self._depth[number] += 1
        try:
            yield
        finally:
            self._depth[number] -= 1
            if self._depth[number] == 0:
                for parameter in self._parameters[number]:
                    parameter.data = self._waiting[parameter]
                if self._copies:
                    self._ended = torch.cuda.current_stream(self.device).record_event()

    def _bring(self, number: int) -> None:
        waiting = self._ahead.pop(number, None)
        with torch.inference_mode(False):  # or no backward pass could use what comes
            ready, event = waiting.result() if waiting else self._fetch(number, self._wanted(number))
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        for parameter, weight in ready:
            parameter.data = weight
            if event is not None:
                weight.record_stream(torch.cuda.current_stream(self.device))
        if self._ended is not None:  # or blocks would be sent faster than the device is done with them
            self._ended.synchronize()
        following = number - 1 if self._last == number + 1 else number + 1  # a backward pass takes them in reverse
        self._last = number
        if 0 <= following < len(self._parameters) and following not in self._ahead:
            self._ahead = {following: self._thread.submit(self._fetch, following, self._wanted(following))}

    def _wanted(self, number: int) -> list[Source | None]:
        return [self._sources.get(parameter) for parameter in self._parameters[number]]

    def _fetch(self, number: int, sources: Sequence[Source | None]) -> Ready:
        """A block's weights on the device, and what to wait for before they are used."""
        with torch.cuda.stream(self._copies) if self._copies else contextlib.nullcontext():
            found = [
                (
                    parameter,
                    source(self.device) if source else self._waiting[parameter].to(self.device, non_blocking=True),
                )
                for parameter, source in zip(self._parameters[number], sources, strict=True)
            ]
            return found, self._copies.record_event() if self._copies else None
