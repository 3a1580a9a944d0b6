"""EvoPress's published settings by application (arXiv 2410.14649, appendix), by name."""

from __future__ import annotations

import math
from typing import Any

from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.searcher import one_of, positive
from evo_hpo.space.compression_space import CompressionSpace

__all__ = ["PRESETS", "most_generations", "resolved"]

DEPTH_RULE = "k(n-k)/1.5"  # generations, where k of n units are dropped
_ROUNDED_UP = {"init": "decremented", "initial": 32}  # the uniform assignment itself where the target is one level

PRESETS: dict[str, dict[str, Any]] = {
    "plain": {"offspring": 4, "survivors": (1,), "tokens": None, "cross_group": 0.5, "revisit": False},
    "depth_pruning": {
        "generations": DEPTH_RULE,
        "offspring": 32,
        "survivors": (2, 1),
        "tokens": (2048, 32768),
        "init": "random",
        "initial": 64,
        "initial_tokens": 2048,
    },
    "sparsity": {
        "offspring": 64,
        "survivors": (8, 2, 1),
        "tokens": (2048, 16384, 65536),
        "generations": 400,
        **_ROUNDED_UP,
    },
    "quantization": {
        "offspring": 128,
        "survivors": (16, 4, 1),
        "tokens": (2048, 16384, 131072),
        "generations": 150,
        **_ROUNDED_UP,
    },
    "super_fast": {"offspring": 16, "survivors": (1, 1), "tokens": (512, 8192), "generations": 400, **_ROUNDED_UP},
}
"""Published settings by application; ``plain`` is a single-stage search for problems without fidelity."""

_COMMON: dict[str, Any] = {
    "init": "uniform",
    "initial": 1,
    "initial_tokens": None,
    "generations": None,
    "cross_group": 0.0,
    "revisit": True,
}


def resolved(preset: str, **given: Any) -> dict[str, Any]:
    """The settings of a preset, with those that are given in their place.

    Raises:
        InvalidSettingError: no such preset.
    """
    chosen = {key: value for key, value in given.items() if value is not None}
    return _COMMON | PRESETS[one_of("preset", preset, *PRESETS)] | chosen


def most_generations(space: CompressionSpace, given: int | str | None) -> float:
    """The most generations; the rule of depth pruning drops k of n units in the group where that takes longest."""
    if not isinstance(given, str):
        return math.inf if given is None else positive("generations", given)
    if given != DEPTH_RULE:
        raise InvalidSettingError(f"generations={given!r} must be an integer of at least 1, or {DEPTH_RULE!r}")
    if not space.two_levels:
        return math.inf  # a rule for units that are dropped or kept
    start, most = space.uniform(), 1
    for members in space.groups().values():
        dropped = sum(start[i] == space.lowest[i] for i in members)
        most = max(most, math.ceil(dropped * (len(members) - dropped) / 1.5))
    return most
