"""Mixture-of-experts blocks whose experts are stored as one 3-D parameter, taken apart into ordinary linear modules."""

from __future__ import annotations

import torch
from torch import nn


class LinearExpert(nn.Module):
    """One gated expert: down(act(gate(x)) * up(x))."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, activation: nn.Module) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2, dim=0)
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.down_proj = _linear(down)
        self.act_fn = activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: tokens x width -> tokens x width."""
        result: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return result


class LinearExperts(nn.ModuleList):
    """The experts of one block as separate modules; called like the fused module it replaces."""

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

    Only the plain gated layout is touched: gate_up_proj (experts x 2 inner x width), down_proj
    (experts x width x inner), no biases, not transposed. Anything else stays as it is.
    """
    fused = [(name, module) for name, module in model.named_modules() if _is_fused(module)]
    for name, module in fused:
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], _taken_apart(module))
    return len(fused)


def _is_fused(module: nn.Module) -> bool:
    gate_up = getattr(module, "gate_up_proj", None)
    down = getattr(module, "down_proj", None)
    if not (isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter)):
        return False
    plain = gate_up.dim() == 3 and down.dim() == 3 and len(list(module.parameters(recurse=False))) == 2
    matching = plain and gate_up.shape[1] == 2 * down.shape[2] and gate_up.shape[2] == down.shape[1]
    return matching and isinstance(getattr(module, "act_fn", None), nn.Module)


def _taken_apart(module: nn.Module) -> LinearExperts:
    gate_up, down, activation = module.gate_up_proj, module.down_proj, module.act_fn
    assert isinstance(gate_up, nn.Parameter)
    assert isinstance(down, nn.Parameter)
    assert isinstance(activation, nn.Module)
    return LinearExperts(LinearExpert(gate_up[i], down[i], activation) for i in range(gate_up.shape[0]))


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return linear
