"""Gives a model the weights of an assignment by swapping references: nothing is copied."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evo_hpo.errors import StoreError
from evo_hpo.levels.levels import Levels, StoredLevels
from evo_hpo.levels.packing import Encoded
from evo_hpo.models.dropping import Absent, absent
from evo_hpo.models.experts import LinearExperts
from evo_hpo.models.gates import GatedModel
from evo_hpo.models.streaming import Source
from evo_hpo.models.structure import is_matrix, is_transposed, weight_users
from evo_hpo.scoring.arithmetic import InputRounding, InputTypes
from evo_hpo.scoring.prepacking import Prepacked, use_prepacked
from evo_hpo.space.compression_space import Assignment, Unit

_NEITHER = -2
"""In place of a level while it is switched: what fails on the way leaves some members at one and some at another."""


class WeightSwitch:
    """Sets the levels of a gated model's units.

    Args:
        gated: the model; its weights are references that this class replaces and restores.
        levels: the weights of each unit's levels.
        example: token ids for one pass that learns what stands for members that may be dropped.
        lock: held while the store is read (the store need not be thread-safe).
        packed_bytes: memory for packed copies of weights (see :mod:`evo_hpo.scoring.prepacking`).
        inputs: what inputs are rounded to at each level; None: they are as they come.

    Attributes:
        modules: name -> module of every unit's members.
        silent: names of the members that are dropped and are no whole blocks.
        rounding: of inputs, where they are rounded.

    Raises:
        StoreError: a unit's member is not in the model, or a level's weight has another shape.
        ModelError: a member that is no linear layer cannot be dropped.
    """

    def __init__(
        self,
        gated: GatedModel,
        levels: Levels,
        example: Tensor,
        lock: threading.Lock,
        packed_bytes: int = 0,
        inputs: InputTypes | None = None,
    ) -> None:
        self.levels, self._gated, self._lock = levels, gated, lock
        self._inputs, self.rounding = inputs, None if inputs is None else InputRounding(gated.model)
        modules = dict(gated.model.named_modules())
        self.modules: dict[str, nn.Module] = {}
        for unit in levels.units:
            for name in unit.members:
                if name not in modules:
                    raise StoreError(
                        f"unit {unit.name!r}: the model has no module {name!r}; is it another model's store?"
                    )
                self.modules[name] = modules[name]
        self._users = weight_users(gated.model, self.modules)
        self._numbers = {name: number for number, name in enumerate(gated.blocks)}
        self._dense: dict[str, Tensor] = {}
        self._absent: dict[str, Absent] = {}
        self.silent: set[str] = set()
        self._note_outputs(example)
        self._current: list[int] = [-1] * len(levels.units)
        self.packed = Prepacked(packed_bytes)
        self._linear = use_prepacked(_seeing_every_token(gated, self.modules) if packed_bytes else ())
        self._new = set(range(len(levels.units)))  # units whose level was not in place for two candidates in a row

    def expect(self, rows: int) -> None:
        """Says how many positions (sequences x length) the passes to come will have."""
        if self.packed.expect(rows):
            self._new = set(range(len(self._current)))

    def set(self, assignment: Assignment | None, pack: bool = False) -> None:
        """Switches every unit whose level differs from the one in place; None: the uncompressed model.

        Args:
            pack: the pass to come has the expected number of positions: pack the weights that are used again.
        """
        wanted = [-1] * len(self._current) if assignment is None else assignment
        for unit, level in enumerate(wanted):
            if level != self._current[unit]:
                self._current[unit] = _NEITHER
                self._switch(unit, level)
                self._current[unit] = level
                self._new.add(unit)
            elif pack and unit in self._new:
                self._pack(unit)
                self._new.discard(unit)
        if self._inputs is not None and self.rounding is not None:
            self.rounding.types = self._inputs.at(assignment)

    def _switch(self, unit: int, level: int) -> None:
        weights: Mapping[str, Tensor | Encoded | None] = {}
        for name in self.levels.units[unit].members:  # the level in place goes before another is decoded
            if name in self._dense:
                self.modules[name].weight.data = self._dense[name]
        if level >= 0:
            with self._lock, torch.inference_mode(False):  # or no backward pass could use what a store keeps
                weights = self._weights(unit, level)
        for name in self.levels.units[unit].members:
            weight = weights.get(name, self._dense.get(name))
            if name in weights and weight is None:
                self._drop(name)
            else:
                self._place(name, weight)

    def _weights(self, unit: int, level: int) -> Mapping[str, Tensor | Encoded | None]:
        """A level's weights; where blocks are brought to the device, as they are stored: they are decoded there."""
        encoded: Mapping[str, Encoded] = {}
        if self._gated.stream and isinstance(self.levels, StoredLevels):
            encoded = self.levels.encoded(unit, level)
        if encoded.keys() >= set(self.levels.units[unit].members):
            return encoded
        return {**self.levels.weights(unit, level), **encoded}

    def _pack(self, unit: int) -> None:
        """Packs weights that are used again; a level that one candidate alone has is not worth it.

        What is packed stays so while another level is tried, for the candidates after that one.
        """
        for name in self.levels.units[unit].members:
            module = self.modules[name]
            if module in self._linear and name not in self.silent:
                assert isinstance(module.weight, Tensor)
                self.packed.keep(name, module.weight.data)

    def _place(self, name: str, weight: Tensor | Encoded | None) -> None:
        module = self.modules[name]
        self._restore(name)
        if self._gated.stream and self._gated.stream.brings(module):
            assert isinstance(module.weight, nn.Parameter)
            self._gated.stream.give(module.weight, None if weight is None else self._source(name, module, weight))
            return
        if weight is None:
            return
        parameter = module.weight
        assert isinstance(parameter, Tensor)
        if isinstance(weight, Encoded):  # of a matrix outside of the blocks, which stays on the device
            weight = self._source(name, module, weight)(parameter.device)
        self._check(name, weight, parameter)
        self._dense.setdefault(name, parameter.data)
        parameter.data = weight.to(parameter.device, non_blocking=True)

    def _source(self, name: str, module: nn.Module, weight: Tensor | Encoded) -> Source:
        """Makes a level's weight on the device where its block runs."""
        parameter = module.weight
        assert isinstance(parameter, Tensor)

        def make(device: torch.device) -> Tensor:
            found = weight.to(device, non_blocking=True) if isinstance(weight, Tensor) else weight.to(device)
            if isinstance(found, Encoded):
                found = found.decode(parameter.dtype)
                found = found.T.contiguous() if is_transposed(module) else found
            self._check(name, found, parameter)
            return found

        return make

    @staticmethod
    def _check(name: str, weight: Tensor, parameter: Tensor) -> None:
        if weight.shape != parameter.shape or weight.dtype != parameter.dtype:
            raise StoreError(
                f"weight of {name!r} is {tuple(weight.shape)} {weight.dtype}, the model needs"
                f" {tuple(parameter.shape)} {parameter.dtype}: build the store for this model"
            )

    def _drop(self, name: str) -> None:
        if name in self._numbers:
            self._gated.dropped.add(self._numbers[name])
        else:
            for user in self._users[name]:
                user.forward = self._nothing(name)
            self.silent.add(name)

    def _restore(self, name: str) -> None:
        if name in self._numbers:
            self._gated.dropped.discard(self._numbers[name])
        elif name in self.silent:
            for user in self._users[name]:
                del user.forward
            self.silent.discard(name)

    def _nothing(self, name: str) -> Callable[..., Any]:
        if name in self._absent:
            return self._absent[name]
        width = _width(self.modules[name])

        def nothing(hidden: Tensor) -> Tensor:
            return hidden.new_zeros(*hidden.shape[:-1], width)

        return nothing

    def _note_outputs(self, example: Tensor) -> None:
        """Learns what stands for each module that is no linear layer, and so can only be dropped or kept."""

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
                self._absent[name] = absent(name, module, args, kwargs)

            return hook

        modules = {n: m for n, m in self.modules.items() if n not in self._numbers and not is_matrix(m)}
        hooks = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in modules.items()]
        try:
            with torch.inference_mode():
                self._gated.final_hidden(example)
        finally:
            for each in hooks:
                each.remove()
        if unseen := sorted(set(modules) - set(self._absent)):
            raise StoreError(f"{unseen[0]!r} did not run in a forward pass: it cannot be dropped")


def _seeing_every_token(gated: GatedModel, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Members that are no experts, which are given another number of tokens each time, nor the head."""
    experts = tuple(f"{name}." for name, module in gated.model.named_modules() if isinstance(module, LinearExperts))
    inside = ((name, module) for name, module in modules.items() if module is not gated.head)
    return (module for name, module in inside if not (experts and name.startswith(experts)))


def _width(module: nn.Module) -> int:
    """Width of a linear layer's output."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1] if is_transposed(module) else weight.shape[0])


def blocks_of_units(units: Sequence[Unit], blocks: Sequence[str], outer: Sequence[str] = ()) -> list[tuple[int, ...]]:
    """Units on which the output of each block depends, or what follows it, and of no block before it; in order.

    Args:
        outer: names of the embedding, which is the first block's, and of a head of its own, which is the last one's.

    Raises:
        StoreError: a unit lies elsewhere.
    """
    found: list[list[int]] = [[] for _ in blocks]
    ends = dict(zip(outer, (0, len(blocks) - 1), strict=False))
    for index, unit in enumerate(units):
        for member in unit.members:
            inside = (n for n, block in enumerate(blocks) if member == block or member.startswith(f"{block}."))
            number = ends.get(member, next(inside, None))
            if number is None:
                raise StoreError(
                    f"unit {unit.name!r}: {member!r} is in no decoder block, nor embedding or head: nothing else can be"
                    " searched"
                )
            if index not in found[number]:
                found[number].append(index)
    return [tuple(members) for members in found]
