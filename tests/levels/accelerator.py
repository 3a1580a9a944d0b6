"""A stand-in for an accelerator: tensors that say they are on `cuda:0` and refuse to meet those that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

ACCELERATOR = torch.device("cuda", 0)
_MIXES_NO_NUMBERS = {"ldexp"}
"""Most operations take a tensor of no dimension from anywhere; these do not."""
_MAY_MIX = {"copy_", "__get__", "__set__", "is_set_to", "_has_compatible_shallow_copy_type"}


def on_accelerator(tensor: torch.Tensor) -> bool:
    """Whether the tensor was put on the stand-in."""
    return getattr(tensor, "_accelerated", False)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _place(value: Any, there: bool) -> Any:
    for tensor in _tensors(value):
        tensor.__dict__["_accelerated"] = there
    return value


def _is_accelerator(value: Any) -> bool:
    return isinstance(value, str | torch.device) and torch.device(value).type == ACCELERATOR.type


class StandIn(TorchFunctionMode):
    """While active, `cuda:0` exists: everything runs on the CPU, but an operation on tensors of both places fails."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:
            return ACCELERATOR if on_accelerator(args[0]) else torch.device("cpu")
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            _place(args[0], on_accelerator(args[1]))
            return func(*args)
        if name == "__deepcopy__":  # its memo may hold tensors of both places
            return _place(func(*args, **named), on_accelerator(args[0]))
        if name in ("to", "cpu", "cuda"):
            return self._moved(func, name, args, named)
        there = _is_accelerator(named.get("device"))
        if there:
            named["device"] = "cpu"
        least = 0 if name in _MIXES_NO_NUMBERS else 1
        places = {on_accelerator(tensor) for tensor in _tensors((args, named)) if torch.Tensor.dim(tensor) >= least}
        if len(places) == 2 and name not in _MAY_MIX:
            raise RuntimeError(f"{name}: tensors on {ACCELERATOR} and on the CPU")
        found = func(*args, **named)
        return _place(found, True) if there or True in places else found

    def _moved(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        target = next((v for v in (*args[1:], *named.values()) if isinstance(v, str | torch.device)), None)
        if name != "to" or target is None:
            there = name == "cuda" or (name == "to" and on_accelerator(args[0]))
            return _place(func(*args, **named).clone() if name != "to" else func(*args, **named), there)
        args = tuple("cpu" if isinstance(v, str | torch.device) else v for v in args)
        named = {k: "cpu" if isinstance(v, str | torch.device) else v for k, v in named.items()}
        return _place(func(*args, **named).clone(), _is_accelerator(target))
