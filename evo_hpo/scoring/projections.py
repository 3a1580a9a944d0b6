"""What is wanted of weight gradients and the levels' changes, taken block by block as the gradients appear."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from evo_hpo.models.dropping import Absent, absent, first_of
from evo_hpo.models.structure import is_linear, is_matrix, is_transposed
from evo_hpo.scoring.decoded import Decoded
from evo_hpo.scoring.layers_together import WAITING_BYTES, LayersTogether, Visit, are_taken_together
from evo_hpo.scoring.segments import Noted
from evo_hpo.scoring.weight_changes import output_changes, row_changes, squared_lengths, weight_changes
from evo_hpo.search.sensitivities import Form

PART = 32
"""Positions of a part of a sequence."""


class Projector:
    """Collects g . (W_level - W_in_place) for every level of every unit, sequence by sequence, or another form of it.

    Hooks on the members note what runs (:meth:`noted`); whoever goes back through it tells the gradients of the
    outputs. A linear layer's input is kept until then, and both until all runs have been through the block
    (:meth:`finish`). A per-sequence weight gradient, or how outputs move, exists only for some rows at a time.
    On a GPU, layers of 16-bit weights may wait for those of later blocks (:class:`LayersTogether`). A member that may
    be dropped adds its output or takes it away: its projection is the gradient of the output times that output. The
    bias of a layer that is switched on or off counts in the forms ``inner`` and ``output``.

    The embedding's gradient is that of its output; the output head, whose logits exist a chunk at a time, is told its
    own by :meth:`head`. Of one matrix that is both, the two are added up, in every form.

    Where it is parted, ``inner`` is taken part by part: what the layer does at some neighbouring positions. The parts
    of a gradient are almost uncorrelated, so that the sum of their squares has the expectation of the squared sum at a
    fraction of its variance.

    Args:
        modules: members by name; those in ``blocks`` are whole decoder blocks, for which :meth:`whole` is called.
        in_place: name -> whether the member is switched off at the moment.
        outer: the output head, which gets no hook.
        waits: whether layers may wait for those of later blocks, whose weights stay where they are.
    """

    def __init__(
        self,
        decoded: Decoded,
        modules: Mapping[str, nn.Module],
        blocks: Mapping[str, int],
        in_place: Callable[[str], bool],
        outer: nn.Module,
        waits: bool = True,
    ) -> None:
        self._levels, self._modules, self._dropped = decoded.of, modules, in_place
        self._units = decoded.units
        self._original = {
            name: weight.data for name, m in modules.items() if is_matrix(m) and isinstance(weight := m.weight, Tensor)
        }
        self._owners: dict[str, list[int]] = {}
        for number, unit in enumerate(self._units):
            for name in unit.members:
                self._owners.setdefault(name, []).append(number)
        self._noted: list[Noted] = []
        self._waiting: dict[str, list[tuple[slice, tuple[Tensor, Tensor]]]] = {}
        self._sums: list[tuple[NDArray[np.int64], list[int], Tensor]] = []  # of linear layers, on their devices
        self._rows = slice(0, 0)
        self._together_bytes = WAITING_BYTES if waits else 0
        self._together = LayersTogether(1, self._together_bytes)
        self._absent: dict[str, Absent] = {}
        self._found: NDArray[np.float64] = np.zeros((0, 0, 0, 0))
        self._form: Form = "inner"
        for name, module in modules.items():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(self._embedding_hook(name))
            elif name not in blocks and module is not outer:
                module.register_forward_hook(self._hook(name), with_kwargs=True)

    def begin(self, sequences: int, length: int, form: Form = "inner", parted: bool = True) -> None:
        """Starts with zeros; ``parted``: the squares of parts are wanted, which may take half a pass longer."""
        self._form = form
        counts = [len(unit.costs) for unit in self._units]
        parts = -(-length // PART) if parted else 1
        self._found = np.zeros((sequences, parts, len(counts), max(counts)))
        for number, count in enumerate(counts):
            self._found[:, :, number, count:] = np.nan
        self._sums.clear()
        self.forget()
        self._together = LayersTogether(parts, self._together_bytes)
        self.running(slice(0, sequences))

    def running(self, sequences: slice) -> None:
        """Of the sequences that it began with, those that will be told of from now on."""
        self._rows = sequences

    def noted(self) -> list[Noted]:
        """The members that ran since it was last asked, in order."""
        noted, self._noted = self._noted, []
        return noted

    def end(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What was collected (sequences x units x levels), and the sums of the squares of its parts, alike."""
        self._take_together()
        fetched = _on_host([found for _, _, found in self._sums])  # only now: a GPU would be waited for at each
        for (sequences, units, _), found in zip(self._sums, fetched, strict=True):
            levels = found.shape[-1]
            for unit, own in zip(units, found.reshape(len(units), len(sequences), -1, levels), strict=True):
                np.add.at(self._found[:, :, unit, :levels], sequences, own)  # a layer may run twice
        self._sums.clear()
        sums = self._found.sum(axis=1)
        return np.sqrt(sums) if self._form in ("output", "trace") else sums, np.square(self._found).sum(axis=1)

    @torch.no_grad()
    def finish(self) -> None:
        """Takes what several runs left at linear layers: after each block."""
        for name, waiting in self._waiting.items():
            self._linear(name, waiting)
        self._waiting.clear()
        if self._together.are_full:
            self._take_together()

    def forget(self) -> None:
        """Gives back what was noted and what waits; what was collected stays."""
        self._noted.clear()
        self._waiting.clear()
        self._together.forget()

    def whole(self, name: str, output: Tensor, gradient: Tensor) -> None:
        """A member that is kept or dropped as a whole.

        Args:
            output: what it contributes when it is kept, sequences x length x hidden.
            gradient: of its output, alike.
        """
        product = self._by_part((gradient.float() * output.float()).double())
        if self._form == "absolute":
            found = product.abs().sum(dim=(1, 2))
        elif self._form == "output":
            found = product.square().sum(dim=(1, 2))
        elif self._form == "trace":  # the outputs are what it has instead of weights
            squares = (self._by_part(x.double()).square().sum(dim=(1, 2)) for x in (gradient, output))
            found = next(squares) * next(squares) / product[0].numel()
        else:
            found = product.sum(dim=(1, 2)) * (1.0 if self._dropped(name) else -1.0)
        contribution = found.cpu().numpy()
        for unit in self._owners[name]:
            for level, weights in enumerate(self._levels(unit)):
                gone = name in weights and weights[name] is None
                if gone if self._form == "absolute" else gone != self._dropped(name):
                    self._of(unit)[:, level] += contribution

    def head(self, name: str, given: Tensor, gradients: Iterable[tuple[slice, Tensor]]) -> None:
        """The member whose weight the output head has.

        Args:
            given: final hidden states, (sequences x positions that predict) x hidden.
            gradients: of the products of head and hidden states, by entries of the vocabulary, alike.
        """
        place, form = self._weight(name), self._form
        inputs = self._predicting(given.to(place.dtype))
        targets = {unit: self._targets(unit, name) for unit in self._owners[name]}
        lengths: dict[int, list[tuple[Tensor, Tensor]]] = {unit: [] for unit in targets}
        for entries, gradient in gradients:
            seen = [(self._predicting(gradient.to(inputs.dtype)), inputs)]
            for unit, levels in targets.items():
                rows, sums = [level[entries] for level in levels], self._of(unit)[:, : len(levels)]
                if form == "trace":
                    lengths[unit].append(squared_lengths(seen, place.data[entries], rows))
                elif form == "output":
                    sums += output_changes(seen, place.data[entries], rows, None, False).cpu().numpy()
                else:
                    at = self._original[name] if form == "absolute" else place.data
                    sums += weight_changes(seen, at[entries], rows, form).cpu().numpy()
        for unit, parts in lengths.items():
            if parts:
                gradients, changes = (torch.stack(each).sum(0) for each in zip(*parts, strict=True))
                whole = torch.outer(gradients, changes) / place.numel()
                self._of(unit)[:, : len(targets[unit])] += whole.cpu().numpy()

    def _predicting(self, values: Tensor) -> Tensor:
        """By part, of values that the last position of each sequence has none of."""
        values = values.view(self._rows.stop - self._rows.start, -1, values.shape[-1])
        return self._by_part(pad(values, (0, 0, 0, 1)))

    def _embedding_hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            leaf = output.detach().requires_grad_()
            self._noted.append(Noted.of(leaf, partial(self._embedded, name, args[0])))
            return leaf

        return hook

    def _embedded(self, name: str, ids: Tensor, gradient: Tensor) -> None:
        place = self._weight(name)
        ones = {"weight": place.data.new_ones(()).expand(place.shape)}
        scale = functional_call(self._modules[name], ones, (ids[:1, :1],))  # some embeddings multiply by a number
        taken, gradient = self._by_part(ids[..., None])[..., 0], self._by_part(gradient * scale)
        for unit in self._owners[name]:
            targets = self._targets(unit, name)
            at = self._original[name] if self._form == "absolute" else place.data
            self._of(unit)[:, : len(targets)] += row_changes(taken, gradient, at, targets, self._form).cpu().numpy()

    def _weight(self, name: str) -> Tensor:
        weight = self._modules[name].weight
        assert isinstance(weight, Tensor)
        return weight

    def _targets(self, unit: int, name: str) -> list[Tensor]:
        """A matrix outside of the blocks at each level, which drops none."""
        found = (level.get(name, self._original[name]) for level in self._levels(unit))
        return [target for target in found if target is not None]

    def _hook(self, name: str) -> Callable[..., Any]:
        linear = is_linear(self._modules[name])

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            off = self._dropped(name)
            if off and not first.requires_grad:
                # zeros, so that their gradient is there; cloned, for some blocks add to them in place
                first = first.detach().requires_grad_().clone()
            if linear:
                given = (args[0] if args else kwargs["input"]).detach().to(self._weight(name).dtype)
                self._noted.append(Noted.of(first, partial(self._wait, name, given)))
            else:
                with torch.no_grad():
                    kept = first_of(type(module).forward(module, *args, **kwargs)) if off else first.detach()
                    if name not in self._absent:
                        self._absent[name] = absent(name, module, args, kwargs)
                    added = kept - first_of(self._absent[name](*args, **kwargs))  # not the residual, if it adds that
                self._noted.append(Noted.of(first, partial(self.whole, name, added)))
            return None if not off else first if rest is None else (first, *rest)

        return hook

    @torch.no_grad()
    def _take_together(self) -> None:
        every = np.arange(len(self._found))
        self._sums += [(every, units, sums) for units, sums in self._together.take()]

    def _wait(self, name: str, given: Tensor, gradient: Tensor) -> None:
        gradient = gradient.to(given.dtype)
        if are_taken_together(gradient) and self._visited(name, given, gradient):
            return
        seen = self._rows, (self._by_part(gradient), self._by_part(given))
        if self._rows == slice(0, len(self._found)):
            self._linear(name, [seen])
        else:
            self._waiting.setdefault(name, []).append(seen)

    def _visited(self, name: str, given: Tensor, gradient: Tensor) -> bool:
        """Whether the layer's changes are changes of its weight alone, and can be taken together with others'."""
        if self._form != "inner" or self._rows != slice(0, len(self._found)) or self._dropped(name):
            return False
        sides = [side.reshape(len(self._found), -1, side.shape[-1]) for side in (gradient, given)]
        left, right = reversed(sides) if is_transposed(self._modules[name]) else sides
        visits = []
        for unit in self._owners[name]:
            found = [level.get(name, self._original[name]) for level in self._levels(unit)]
            targets = [target for target in found if target is not None and target.device == gradient.device]
            if len(targets) < len(found):
                return False
            visits.append(Visit(unit, left, right, self._weight(name).data, targets))
        self._together.add(visits)
        return True

    def _linear(self, name: str, waiting: list[tuple[slice, tuple[Tensor, Tensor]]]) -> None:
        module, off = self._modules[name], self._dropped(name)
        weight, bias = self._weight(name), getattr(module, "bias", None)
        sequences = np.concatenate([np.arange(rows.start, rows.stop) for rows, _ in waiting])
        seen, place = [pair for _, pair in waiting], None if off else weight.data
        for unit in self._owners[name]:
            found = self._levels(unit)
            targets = [level[name] if name in level else self._original[name] for level in found]
            targets = [None if target is None else target.to(weight.device) for target in targets]
            signs = [float(off) - float(target is None) for target in targets]  # a switched-off layer adds no bias
            if self._form == "output":
                shifts = None if bias is None else [sign * bias.data for sign in signs]
                sums = output_changes(seen, place, targets, shifts, is_transposed(module))
            else:
                pairs = [(right, left) for left, right in seen] if is_transposed(module) else seen
                place_or_original = self._original[name].to(weight.device) if self._form == "absolute" else place
                sums = weight_changes(pairs, place_or_original, targets, self._form)
                if bias is not None and self._form == "inner":
                    outputs = torch.cat(
                        [(gradient.sum(dim=1).double() * bias.double()).sum(dim=1) for gradient, _ in seen]
                    )
                    sums += torch.outer(outputs, sums.new_tensor(signs))
            self._sums.append((sequences, [unit], sums))

    def _of(self, unit: int) -> NDArray[np.float64]:
        """A unit's numbers, all parts of the sequences that are running x levels, to be added to."""
        return self._found[self._rows].reshape(-1, *self._found.shape[2:])[:, unit]

    def _by_part(self, values: Tensor) -> Tensor:
        """Parts of what is running x positions x width, also of values that a model flattened; zeros fill the last."""
        sequences, parts = self._rows.stop - self._rows.start, self._found.shape[1]
        values = values.reshape(sequences, -1, values.shape[-1])
        each = -(-values.shape[1] // parts)
        if missing := each * parts - values.shape[1]:
            values = pad(values, (0, 0, 0, missing))
        return values.reshape(sequences * parts, each, -1)


def _on_host(tensors: Sequence[Tensor]) -> list[NDArray[np.float64]]:
    """Their numbers, each device's brought in one piece."""
    flat: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        flat.setdefault(tensor.device, []).append(tensor.flatten())
    brought = {device: torch.split(torch.cat(own).double().cpu(), [*map(len, own)]) for device, own in flat.items()}
    pieces = {device: iter(own) for device, own in brought.items()}
    return [next(pieces[tensor.device]).view(tensor.shape).numpy() for tensor in tensors]
