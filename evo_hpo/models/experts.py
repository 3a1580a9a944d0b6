"""Mixture-of-experts blocks whose experts are stored as one 3-D parameter, taken apart into ordinary linear modules.

transformers stores the experts of a block as `gate_up_proj` (or `up_proj`, where they have no gate) and `down_proj`,
experts first, and says in attributes whether they are transposed, have biases, or hold gate and up in turns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd


class LinearExpert(nn.Module):
    """One expert: down(gated(gate(x), up(x))), or down(gated(up(x))) where it has no gate."""

    def __init__(
        self, gate: nn.Linear | None, up: nn.Linear, down: nn.Linear, gated: Callable[..., torch.Tensor]
    ) -> None:
        super().__init__()
        if gate is not None:
            self.gate_proj = gate
        self.up_proj, self.down_proj, self._gated = up, down, gated

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: tokens x width -> tokens x width."""
        gate = [self.gate_proj(hidden)] if hasattr(self, "gate_proj") else []
        result: torch.Tensor = self.down_proj(self._gated(*gate, self.up_proj(hidden)))
        return result


class LinearExperts(nn.ModuleList):
    """The experts of one block as separate modules; called like the fused module it replaces."""

    def __init__(self, experts: list[LinearExpert], fused: nn.Module) -> None:
        super().__init__(experts)
        self._fused = (fused,)  # without its weights; in a tuple, so that it is no part of the model

    def forward(self, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden: tokens x width; indices and weights: tokens x experts per token -> tokens x width."""
        result = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            tokens, position = torch.where(indices == number)
            if tokens.numel():
                output = expert(hidden[tokens]) * weights[tokens, position, None]
                result.index_add_(0, tokens, output.to(result.dtype))
        return result


def unfuse_experts(model: nn.Module) -> int:
    """Replace every fused expert module of `model` in place by `LinearExperts`; returns how many were replaced.

    Transposed weights, biases, interleaved gates and special gate functions are kept as they are. What follows another
    layout stays untouched: `fused_leftovers` names it.
    """
    fused = [(name, module) for name, module in model.named_modules() if _is_fused(module)]
    for name, module in fused:
        _replace(model, name, _taken_apart(module))
    return len(fused)


def fuse_experts(model: nn.Module) -> int:
    """Undo `unfuse_experts` with the weights as they are now, so that the model can be saved in its own layout."""
    apart = [(name, module) for name, module in model.named_modules() if isinstance(module, LinearExperts)]
    for name, module in apart:
        _replace(model, name, _put_together(module))
    return len(apart)


def fused_leftovers(model: nn.Module) -> dict[str, int]:
    """Name -> number of weights of every parameter with three dimensions that is no convolution: not compressible."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, _ConvNd):
            for part, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and min(parameter.shape) > 1:
                    found[f"{name}.{part}"] = parameter.numel()
    return found


def _is_fused(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    first = "gate_up_proj" if "gate_up_proj" in parameters else "up_proj"
    if not {first, "down_proj"} <= set(parameters) <= {first, "down_proj", f"{first}_bias", "down_proj_bias"}:
        return False
    up, down = (_outputs_first(module, parameters[name]) for name in (first, "down_proj"))
    if up.dim() != 3 or down.dim() != 3 or not _gate_of(module) or getattr(module, "has_post_expert_norm", False):
        return False
    halves = 2 if first == "gate_up_proj" else 1
    return up.shape[1] == halves * down.shape[2] and up.shape[2] == down.shape[1] and len(up) == len(down)


def _outputs_first(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The weights as experts x outputs x inputs."""
    return weight.transpose(1, 2) if getattr(module, "is_transposed", False) and weight.dim() == 3 else weight


def _gate_of(module: nn.Module) -> bool:
    return hasattr(module, "_apply_gate") or isinstance(getattr(module, "act_fn", None), nn.Module)


def _gated(shell: Any, *parts: torch.Tensor) -> torch.Tensor:
    """What the fused module does between its two projections, on its gate and up parts (or on up alone)."""
    if len(parts) == 1 or not hasattr(shell, "_apply_gate"):
        hidden: torch.Tensor = shell.act_fn(parts[0])
        return hidden if len(parts) == 1 else hidden * parts[1]
    in_turns = not getattr(shell, "is_concatenated", True)
    both = torch.stack(parts, dim=-1).flatten(-2) if in_turns else torch.cat(parts, dim=-1)
    result: torch.Tensor = shell._apply_gate(both)
    return result


def _halves(module: nn.Module, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up rows of one expert (or of its bias), however they are laid out."""
    if getattr(module, "is_concatenated", True):
        gate, up = both.chunk(2, dim=0)
        return gate, up
    return both[::2], both[1::2]


def _taken_apart(module: nn.Module) -> LinearExperts:
    parameters = {name: _outputs_first(module, value) for name, value in module.named_parameters(recurse=False)}
    for name in parameters:
        delattr(module, name)
    gated = functools.partial(_gated, module)
    return LinearExperts([_expert(module, parameters, i, gated) for i in range(len(parameters["down_proj"]))], module)


def _expert(
    module: nn.Module, parameters: dict[str, torch.Tensor], number: int, gated: Callable[..., torch.Tensor]
) -> LinearExpert:
    own = {name: value[number] for name, value in parameters.items()}
    down = _linear(own["down_proj"], own.get("down_proj_bias"))
    if "up_proj" in own:
        return LinearExpert(None, _linear(own["up_proj"], own.get("up_proj_bias")), down, gated)
    weights = _halves(module, own["gate_up_proj"])
    both = own.get("gate_up_proj_bias")
    biases = (None, None) if both is None else _halves(module, both)
    gate, up = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return LinearExpert(gate, up, down, gated)


def _put_together(experts: LinearExperts) -> nn.Module:
    module = experts._fused[0]
    rows: dict[str, list[torch.Tensor]] = {}
    for expert in experts:
        assert isinstance(expert, LinearExpert)
        parts = {name: part for name, part in expert.named_children() if isinstance(part, nn.Linear)}
        for suffix in ("weight", "bias"):
            tensors = {name: getattr(part, suffix) for name, part in parts.items() if getattr(part, suffix) is not None}
            if "gate_proj" in tensors:
                both = (tensors.pop("gate_proj"), tensors.pop("up_proj"))
                in_turns = not getattr(module, "is_concatenated", True)
                tensors["gate_up_proj"] = torch.stack(both, 1).flatten(0, 1) if in_turns else torch.cat(both)
            for name, tensor in tensors.items():
                rows.setdefault(name if suffix == "weight" else f"{name}_bias", []).append(tensor.detach())
    for name, stacked in rows.items():
        full = _outputs_first(module, torch.stack(stacked)).contiguous()
        module.register_parameter(name, nn.Parameter(full, requires_grad=False))
    return module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear
