"""What a program can serve: its rules, a set of levels in which every assignment keeps them, and profiles that do not.

The rules are those of packed integer weights (compressed-tensors) as transformers 5.23 and vLLM 0.32 load them: 2 to 8
bits, in groups that follow the columns, one scheme for layers that the program fuses. vLLM has kernels for zero points
at 4 and 8 bits; transformers loads none. llama.cpp runs ggml types; experts of a block are one tensor there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.level_set import Choice, LevelSet, bundled
from evo_hpo.levels.packed_size import follows_columns, has_zero_points, scheme

_log = logging.getLogger("evo_hpo")

FUSED: Mapping[str, str] = {
    "qkv_proj": r"(.*)\.[qkv]_proj$",
    "experts": r"(.*)\.experts\.\d+\..*$",
    "gate_up_proj": r"(.*)\.(?:gate|up)_proj$",
}
"""Layers that vLLM reads as one matrix: name of the whole -> expression whose group is equal for its parts."""

STACKED: Mapping[str, str] = {
    f"experts.{part}_proj": rf"(.*)\.experts\.\d+\.{part}_proj$" for part in ("gate", "up", "down")
}
"""The same of experts that are one tensor a projection in a GGUF file."""


@dataclass(frozen=True)
class Server:
    """The rules of one program.

    Attributes:
        format: what is exported for it.
        fused: layers that must share a level.
        asymmetric: bit-widths that may have zero points.
        experts: mixtures of experts can be loaded.
    """

    name: str
    format: str
    fused: Mapping[str, str]
    asymmetric: tuple[int, ...] = ()
    experts: bool = True

    def obstacle(self, choice: Choice, parallel: int = 1) -> str:
        """Why one module at one level cannot be served, or nothing.

        Args:
            parallel: devices that share the columns of a layer whose inputs are divided (tensor parallelism).
        """
        found, name = scheme(choice.unit, choice.level), choice.unit.name
        if self.format == "gguf":
            smaller = choice.level.settings.get("kind") in ("ggml", "kept", "dropped")
            return "" if smaller else "it is no ggml type and would be written as F16: search with method = 'ggml'"
        if choice.level.settings.get("kind") == "ggml":
            return f"{self.name} does not run ggml types"
        if found is None:
            return ""  # dense weights
        bits, _, size = found
        columns = choice.unit.shape[1]
        if choice.unit.transposed:
            return "its weights are stored as inputs x outputs, which packed weights cannot be"
        if re.search(r"\.experts\.\d+\.", name) and not self.experts:
            return f"{self.name} loads no mixture of experts with packed weights"
        if not _follows_columns(choice):
            return "its groups do not follow its columns: build with static_groups = true"
        if not 2 <= bits <= 8:
            return f"{bits} bits are outside 2 to 8"
        if has_zero_points(choice.unit, choice.level) and bits not in self.asymmetric:
            allowed = f" at {bits} bits (only at {' and '.join(map(str, self.asymmetric))})" if self.asymmetric else ""
            return f"{self.name} has no zero points{allowed}: build with symmetric = true"
        if columns % size:
            return f"its {columns} inputs are not a multiple of the group size {size}"
        divided = re.search(r"(o_proj|down_proj|out_proj|dense|fc2|w2)$", name)
        if parallel > 1 and divided and size != columns and (columns % parallel or (columns // parallel) % size):
            return f"its {columns} inputs divided by {parallel} are not a multiple of the group size {size}"
        return ""

    def served(self, levels: LevelSet, parallel: int = 1) -> LevelSet:
        """The levels that can be served, with what the program fuses tied: every assignment of them is servable.

        Raises:
            InvalidSettingError: a unit has no level left; the message says why.
        """
        rows, lost = [], {}
        for name, choices in levels.rows():
            reasons = [next(filter(None, (self.obstacle(c, parallel) for c in level)), "") for level in choices]
            kept = [level for level, reason in zip(choices, reasons, strict=True) if not reason]
            if not kept:
                raise InvalidSettingError(f"serve={self.name!r} leaves {name!r} without a level: {reasons[0]}")
            lost.update({r: (name, level[0].level.label) for level, r in zip(choices, reasons, strict=True) if r})
            rows.append((name, kept))
        for reason, (name, label) in lost.items():
            _log.warning("left out for %s, such as level %s of %r: %s", self.name, label, name, reason)
        found = LevelSet(rows, levels.resource)
        return found.tied(self.fused) if self.fused else found

    def refusal(self, modules: Mapping[str, Choice], parallel: int = 1) -> str:
        """Why a profile cannot be served, or nothing; ``modules``: name of a module -> its level."""
        for name, choice in modules.items():
            if reason := self.obstacle(choice, parallel):
                return f"{name} at level {choice.level.label}: {reason}"
        together: dict[str, list[str]] = {}
        for name in modules:
            together.setdefault(bundled(name, self.fused), []).append(name)
        for members in together.values():
            if len({_kind(modules[member]) for member in members}) > 1:
                told = ", ".join(f"{m} at level {modules[m].level.label}" for m in members)
                return f"{self.name} reads {told} as one matrix with one scheme: search with serve = {self.name!r}"
        return ""


def _follows_columns(choice: Choice) -> bool:
    told = follows_columns(choice.unit, choice.level)
    if told is None:  # what is stored says it
        told = getattr(choice.source.unit_encoded(choice.unit.name, choice.level.label), "group_of", None) is None
    return told


def _kind(choice: Choice) -> object:
    """What must be equal of modules that are one matrix."""
    return scheme(choice.unit, choice.level) or choice.level.settings.get("type", "dense")


SERVERS = {
    server.name: server
    for server in (
        Server("vllm", "compressed-tensors", FUSED, asymmetric=(4, 8)),
        Server("transformers", "compressed-tensors", {}, experts=False),
        Server("llama.cpp", "gguf", STACKED),
    )
}


def server_named(name: str) -> Server:
    """The program of this name.

    Raises:
        InvalidSettingError: there is none.
    """
    if name not in SERVERS:
        raise InvalidSettingError(f"serve={name!r} must be one of: {', '.join(SERVERS)}")
    return SERVERS[name]


def check_levels(server: Server, method: str, levels: Sequence[Any], symmetric: bool) -> None:
    """Refuses levels that cannot be served before anything is built.

    Raises:
        InvalidSettingError: naming the first.
    """
    if server.format == "gguf" and method != "ggml":
        raise InvalidSettingError(f"serve={server.name!r} runs ggml types: set method = 'ggml', not {method!r}")
    if server.format != "gguf" and method == "ggml":
        raise InvalidSettingError(f"serve={server.name!r} does not run ggml types: set serve = 'llama.cpp'")
    if method not in ("gptq", "rtn"):
        return  # ggml types, and dense weights, are served as they are
    for bits in levels:
        if not 2 <= bits <= 8:
            raise InvalidSettingError(f"serve={server.name!r} has 2 to 8 bits, not the level {bits:g}")
        if not symmetric and bits not in server.asymmetric:
            where = f"only at {' and '.join(map(str, server.asymmetric))} bits" if server.asymmetric else "at no bits"
            raise InvalidSettingError(
                f"serve={server.name!r} has zero points {where}: leave symmetric out of the build, or set it to true"
            )
