"""What "dropped" means: the module adds nothing to the residual stream, and the stream itself is unchanged.

A model that is written to disk keeps a dropped module, with all its parameters zero. So a module or block may be
dropped where that is the same as leaving it out, which is tried on a few tokens, not looked up in a list:

- a block whose linear layers are zero must hand on its input (norms after the addition, scaled streams do not);
- a whole block whose parameters are all zero must do so too;
- a module whose parameters are zero must return zeros, or one of its inputs (where it adds the residual itself).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from evo_hpo.errors import ModelError
from evo_hpo.models.gates import replicate
from evo_hpo.models.structure import decoder_blocks, is_linear

Absent = Callable[..., Any]
"""Called like a module that is dropped, it returns what that module would with all its parameters zero."""


@contextlib.contextmanager
def zero_parameters(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """The parameters are zero within the context; it takes no memory."""
    kept = [(parameter, parameter.data) for parameter in parameters]
    try:
        for parameter, data in kept:
            parameter.data = torch.zeros((), dtype=data.dtype, device=data.device).expand(data.shape)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def first_of(output: Any) -> Tensor:
    """The hidden states in what a module or block returns."""
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


def absent(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Absent:
    """What stands for a dropped module, learned from one call of it.

    Raises:
        ModelError: with all its parameters zero it returns neither zeros nor one of its inputs.
    """
    with zero_parameters(module.parameters()):
        output = module.forward(*args, **kwargs)
    hidden = first_of(output)
    rest = [None] * (len(output) - 1) if isinstance(output, tuple | list) else None
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    tensors = [(key, value) for key, value in given if isinstance(value, Tensor) and value.shape == hidden.shape]
    place = next((key for key, value in tensors if torch.equal(value, hidden)), None) if hidden.any() else None
    if hidden.any() and place is None:
        raise ModelError(f"{name} ({type(module).__name__}) cannot be dropped: without weights it still adds something")
    width = hidden.shape[-1]

    def nothing(*args: Any, **kwargs: Any) -> Any:
        if place is None:
            first = args[0] if args else kwargs["hidden_states"]
            stream = first.new_zeros(*first.shape[:-1], width)
        else:
            stream = args[place] if isinstance(place, int) else kwargs[place]
        return stream if rest is None else (stream, *rest)

    return nothing


def check_droppable(model: nn.Module, members: Collection[str], example: Tensor) -> None:
    """Refuses modules and blocks that cannot be left out of this model.

    Args:
        model: not changed.
        members: names of decoder blocks, or of modules inside of them.
        example: token ids, sequences x length.

    Raises:
        ModelError: naming the architecture, the block and the reason.
    """
    if not members:
        return
    model = replicate(model)
    blocks = decoder_blocks(model)
    chosen = {name: {m for m in members if m == name or m.startswith(f"{name}.")} for name in blocks}
    _refuse_shared(model, blocks, chosen)
    modules = {m: model.get_submodule(m) for m in members if m not in blocks and not is_linear(model.get_submodule(m))}
    stand_ins: dict[str, Absent] = {}

    def learn(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            stand_ins[name] = absent(name, module, args, kwargs)

        return hook

    def look(name: str) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            whole = name in chosen[name]
            inside = {modules[m]: m for m in chosen[name] if m in modules}
            if missing := [m for m in inside.values() if m not in stand_ins]:
                raise ModelError(f"{min(missing)} of {type(model).__name__} cannot be dropped: it does not run")
            _compare(model, name, whole, inside, args, kwargs)
            for module, member in inside.items():
                module.forward = stand_ins[member]
            try:
                _compare(model, name, whole, inside, args, kwargs)
            finally:
                for module in inside:
                    del module.forward

        return hook

    with torch.inference_mode(), contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(learn(name), with_kwargs=True).remove)
        for name, block in blocks.items():
            if chosen[name]:
                hooks.callback(block.register_forward_hook(look(name), with_kwargs=True).remove)
        model(input_ids=example, use_cache=False)


def _compare(
    model: nn.Module,
    name: str,
    whole: bool,
    inside: Iterable[nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Runs a block once more with its matrices, linear layers and modules to drop zero, or all of it."""
    block = model.get_submodule(name)
    hidden = args[0] if args else kwargs["hidden_states"]
    zero = {p: None for p in block.parameters() if whole or p.dim() > 1}
    layers = (part for part in block.modules() if is_linear(part))
    zero |= {p: None for part in (*layers, *inside) for p in part.parameters()}
    try:
        with zero_parameters(zero):
            output = first_of(block.forward(*args, **kwargs))
        tolerance = 1e-5 if hidden.dtype == torch.float32 else 1e-2
        same = output.shape == hidden.shape and (output - hidden).abs().max() <= tolerance * hidden.abs().max()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        same = False  # its code takes more from a module than what goes into the stream
    if not same:
        what = "whole blocks" if whole else "attention and MLP modules"
        raise ModelError(
            f"{what} of {type(model).__name__} cannot be dropped: without its weights {name} ({type(block).__name__})"
            " does not hand on its input as it is (a norm after the addition, or a scaled residual stream)"
        )


def _refuse_shared(model: nn.Module, blocks: dict[str, nn.Module], chosen: dict[str, set[str]]) -> None:
    """A module whose weights several blocks use is no module of one block."""
    users: dict[int, set[str]] = {}
    for name, block in blocks.items():
        for parameter in block.parameters():
            users.setdefault(id(parameter), set()).add(name)
    for name, members in chosen.items():
        for member in members:
            for parameter in model.get_submodule(member).parameters():
                if others := users[id(parameter)] - {name}:
                    raise ModelError(
                        f"{member} of {type(model).__name__} cannot be dropped: it shares weights with {min(others)}"
                    )
