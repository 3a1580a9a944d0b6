"""What a causal language model is made of, found without a list of known architectures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from evo_hpo.errors import ModelError

ROUTERS = r"(^|\.)(gate|gate\.wg|router|router\..+|router_gate|shared_expert_gate)$"
"""Names of the routers of mixtures of experts, and of the layers of those that are modules of several."""

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|feed_forward|ffn|moe|experts", re.IGNORECASE)


def refuse_own_code(folder: Path) -> None:
    """A model whose architecture is Python code beside its weights is refused: it would be run in every process.

    Raises:
        ModelError: naming the code.
    """
    from transformers import CONFIG_MAPPING

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    code = config.get("auto_map") or {}
    if code and config.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(
            f"{str(folder)!r} needs code of its own ({', '.join(map(str, code.values()))}), which is not run here: give"
            " a model whose architecture transformers has"
        )


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of the decoder blocks, in running order: the outermost module list with most weights."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    outer = {name: module for name, module in lists.items() if not any(_inside(name, other) for other in lists)}
    if not outer:
        raise ModelError(f"no decoder blocks in {type(model).__name__}: it has no module list")
    prefix = max(outer, key=lambda name: sum(p.numel() for p in outer[name].parameters()))
    return {f"{prefix}.{i}": block for i, block in enumerate(outer[prefix])}


def linear_modules(model: nn.Module, include: str = ".", exclude: str = ROUTERS) -> dict[str, nn.Module]:
    """Name -> module of the linear layers (`nn.Linear`, GPT-2's `Conv1D`) inside the decoder blocks.

    Args:
        include: regular expression that a name must contain.
        exclude: regular expression that a name must not contain; by default the routers of mixtures of experts.

    Raises:
        ModelError: nothing is left.
    """
    wanted, unwanted = re.compile(include), re.compile(exclude) if exclude else None
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()  # a weight that several layers share is compressed once, under the first one's name
    for block_name, block in decoder_blocks(model).items():
        for name, module in block.named_modules(prefix=block_name):
            if is_linear(module) and wanted.search(name) and not (unwanted and unwanted.search(name)):
                if id(module.weight) not in seen:
                    found[name] = module
                seen.add(id(module.weight))
    if not found:
        raise ModelError(f"no linear layer matches include='{include}' exclude='{exclude}': relax the expressions")
    return found


def weight_users(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """Name -> the module and, after it, all other linear layers of the model that have its weight."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if is_linear(module):
            users.setdefault(id(module.weight), []).append(module)
    return {
        name: [module, *(u for u in users.get(id(getattr(module, "weight", None)), ()) if u is not module)]
        for name, module in modules.items()
    }


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies by one weight matrix (`nn.Linear` or `Conv1D`)."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_matrix(module: nn.Module) -> bool:
    """Whether all that the module holds is one weight matrix: a linear layer, or an embedding."""
    return is_linear(module) or isinstance(module, nn.Embedding)


def outer_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of the token embedding and, unless it is the same matrix, the output head, in this order."""
    names = {module: name for name, module in model.named_modules()}
    getters: list[Any] = [getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output")]
    found: dict[int, nn.Module] = {}
    for module in (getter() for getter in getters if getter):
        if isinstance(module, nn.Embedding | nn.Linear) and module in names:
            found.setdefault(id(module.weight), module)
    return {names[module]: module for module in found.values()}


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as inputs x outputs (GPT-2's `Conv1D`)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def droppable_modules(model: nn.Module, kind: str) -> dict[str, tuple[str, ...]]:
    """Unit name -> modules that must contribute nothing for the unit to be dropped, in running order.

    Args:
        kind: "attention", "mlp", "block", or "pair" of consecutive blocks (the last alone where their number is odd).
            Where a block has no feed-forward module of its own (OPT), its last
            linear layer outside the attention stands for it: without its output nothing reaches the residual stream.
    """
    if kind not in ("attention", "mlp", "block", "pair"):
        raise ModelError(f"kind is {kind!r}: use 'attention', 'mlp', 'block' or 'pair'")
    if kind == "pair":
        names = list(decoder_blocks(model))
        return {names[i]: tuple(names[i : i + 2]) for i in range(0, len(names), 2)}
    found: dict[str, tuple[str, ...]] = {}
    for name, block in decoder_blocks(model).items():
        if kind == "block":
            found[name] = (name,)
            continue
        members = _attention(block) if kind == "attention" else _feed_forward(block)
        if not members:
            raise ModelError(f"no {kind} module in {name} ({type(block).__name__}): drop whole blocks instead")
        full = tuple(f"{name}.{member}" for member in members)
        found[full[0]] = full
    return found


def is_attention(name: str) -> bool:
    """Whether a module inside of a block is its attention, or a part of it, by its name there."""
    return _ATTENTION.search(name) is not None


def _attention(block: nn.Module) -> list[str]:
    return [name for name, child in block.named_children() if is_attention(name) and _has_linear(child)]


def _feed_forward(block: nn.Module) -> list[str]:
    children = dict(block.named_children())
    named = [
        name
        for name, child in children.items()
        if _FEED_FORWARD.search(name) and not is_attention(name) and _has_weights(child)
    ]
    if named:
        return named
    return [name for name, child in children.items() if is_linear(child)][-1:]


def _has_linear(module: nn.Module) -> bool:
    return any(is_linear(child) for child in module.modules())


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters())


def _inside(name: str, other: str) -> bool:
    return other != name and name.startswith(f"{other}.")
