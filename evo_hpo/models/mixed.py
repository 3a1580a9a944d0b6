"""Matrix products in bfloat16, everything else in float32.

On a CPU that multiplies bfloat16 natively this takes the time of a model in bfloat16, and differences of candidates err
half as much: the stream that the blocks add to, norms, attention and biases are never rounded. Weights, the inputs of a
product and what comes out of it are; a CPU sums in float32 between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.models.loading import compute_dtype
from evo_hpo.models.structure import linear_modules, outer_matrices

MIXED = "mixed"
"""What settings call it, beside the names of dtypes."""


def rounded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    multiply: Callable[[Tensor, Tensor], Tensor] = functional.linear,
) -> Tensor:
    """A linear layer whose inputs are rounded to the weight's dtype; the bias is added to the rounded product."""
    product = multiply(x.to(weight.dtype), weight).to(x.dtype)
    return product if bias is None else product + bias


class MixedLinear(nn.Linear):
    """A linear layer with a bfloat16 weight and float32 inputs, outputs and bias."""

    def forward(self, input: Tensor) -> Tensor:
        """By :func:`rounded_linear`."""
        return rounded_linear(input, self.weight, self.bias)


class MixedEmbedding(nn.Embedding):
    """An embedding with a bfloat16 table and float32 outputs."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table, in float32."""
        return super().forward(input).float()


_MIXED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: MixedLinear, nn.Embedding: MixedEmbedding}


def check_dtype(name: str) -> None:
    """Raises InvalidSettingError where this is neither a dtype's name nor ``mixed`` nor ``auto``."""
    if name not in (allowed := ("auto", "float32", "bfloat16", "float16", MIXED)):
        raise InvalidSettingError(f"dtype={name!r} must be one of {', '.join(allowed)}")


def model_dtype(name: str) -> torch.dtype:
    """In which a model is loaded, before :func:`mix`; errors as :func:`compute_dtype`."""
    return torch.float32 if name == MIXED else compute_dtype(name)


def matrix_dtype(name: str) -> torch.dtype:
    """Of matrices, which is that of everything but for ``mixed``; errors as :func:`compute_dtype`."""
    return torch.bfloat16 if name == MIXED else compute_dtype(name)


def mix(model: nn.Module) -> None:
    """Gives a float32 model's linear layers, token embedding and head bfloat16 weights, in place; routers stay.

    Raises:
        ModelError: a matrix that could be searched is of a class of its own, which may do more than multiply.
    """
    searchable = linear_modules(model) | outer_matrices(model)
    for name, module in searchable.items():
        if type(module) not in _MIXED:
            raise ModelError(
                f"{type(model).__name__}: {name!r} is a {type(module).__name__}, whose products cannot be taken in"
                " bfloat16 alone: use dtype 'bfloat16' or 'float32'"
            )
    weights = {id(module.weight) for module in searchable.values()}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if id(weight) not in weights:
            continue
        if type(module) not in _MIXED:
            raise ModelError(f"{type(model).__name__}: {name!r} shares its weight and is a {type(module).__name__}")
        assert isinstance(weight, nn.Parameter)
        weight.data = weight.data.to(torch.bfloat16)
        module.__class__ = _MIXED[type(module)]


def dtype_name(model: nn.Module) -> str:
    """``mixed``, or the dtype of the model's weights, as settings call it."""
    if any(isinstance(module, MixedLinear) for module in model.modules()):
        return MIXED
    return str(next(model.parameters()).dtype).removeprefix("torch.")
