"""A model whose decoder blocks are on several devices of a machine; everything else of it is on the first.

Hooks on the blocks move activations: they belong to no replica, so that copies of the model keep them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from evo_hpo.errors import ModelError
from evo_hpo.models.structure import decoder_blocks


def devices_here(name: str) -> tuple[str, ...]:
    """The device called so; ``auto``: every GPU of this machine, or where it has none the CPU."""
    if name != "auto":
        return (name,)
    return tuple(f"cuda:{n}" for n in range(torch.cuda.device_count())) or ("cpu",)


def moved(value: Any, device: torch.device | str) -> Any:
    """The value, tensors inside of tuples, lists and dictionaries included, on a device."""
    return tree_map(lambda item: item.to(device) if isinstance(item, torch.Tensor) else item, value)


def beside_blocks(model: nn.Module, device: torch.device | str) -> None:
    """Moves what is in no decoder block (embeddings, norms, head, buffers), and leaves the blocks where they are."""
    inside = {module for block in decoder_blocks(model).values() for module in block.modules()}
    for module in model.modules():
        if module not in inside:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


class Stages:
    """Which device each decoder block of a model is on: consecutive ones, about as many on each.

    Args:
        blocks: names in running order.
        devices: such as ``("cuda:0", "cuda:1")``.
    """

    def __init__(self, blocks: Sequence[str], devices: Sequence[str]) -> None:
        self.devices = tuple(devices)
        self.of_block = {name: devices[i * len(devices) // len(blocks)] for i, name in enumerate(blocks)}

    def __call__(self, module: str) -> str:
        """The device of a module by its name."""
        return next(
            (d for block, d in self.of_block.items() if re.match(rf"{re.escape(block)}(\.|$)", module)), self.devices[0]
        )

    @classmethod
    def spread(cls, model: nn.Module, devices: Sequence[str]) -> Stages:
        """Moves a model's blocks to their devices, the rest to the first.

        Raises:
            ModelError: blocks on different devices share a weight.
        """
        blocks = decoder_blocks(model)
        stages = cls(list(blocks), devices)
        owner: dict[nn.Parameter, str] = {}
        for name, block in blocks.items():
            for parameter in block.parameters():
                if stages.of_block[owner.setdefault(parameter, name)] != stages.of_block[name]:
                    raise ModelError(f"{owner[parameter]} and {name} share a weight: such a model fits one device only")
        beside_blocks(model, devices[0])
        for name, block in blocks.items():
            block.to(stages.of_block[name])
            block.register_forward_pre_hook(_fetch, with_kwargs=True)
        list(blocks.values())[-1].register_forward_hook(lambda _, __, output: moved(output, devices[0]))
        return stages


def _fetch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a block is called with, on its device."""
    device = next(block.parameters()).device
    return moved(args, device), moved(kwargs, device)
