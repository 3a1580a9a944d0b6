"""What kinds of devices are good at; asked, not measured, since it decides the last bits of results."""

from __future__ import annotations

import torch


def has_small_caches(device: torch.device) -> bool:
    """Whether work is best done a few rows at a time; elsewhere what counts is how many operations are started."""
    return device.type == "cpu"


def has_matrix_units(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices take next to no time beside reading and writing what is multiplied."""
    return device.type != "cpu" or bool(torch.cpu.get_capabilities().get("amx_bf16"))
