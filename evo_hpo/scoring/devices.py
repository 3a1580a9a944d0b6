"""What kinds of devices are good at; asked, not measured, since it decides the bits of results."""

from __future__ import annotations

import torch


def has_small_caches(device: torch.device) -> bool:
    """Whether work is best done a few rows at a time; elsewhere what counts is how many operations are started."""
    return device.type == "cpu"


def has_matrix_units(device: torch.device) -> bool:
    """Whether to multiply bfloat16 matrices takes next to no time beside reading them: taken for granted of a GPU."""
    return device.type != "cpu" or bool(torch.cpu.get_capabilities().get("amx_bf16"))
