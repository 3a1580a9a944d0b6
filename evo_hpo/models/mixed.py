"""Matrix products in bfloat16 with float32 sums, everything else in float32.

On a CPU that multiplies bfloat16 natively this is as fast as a model in bfloat16, and differences of candidates err
half as much: the stream that the blocks add to, norms, attention and biases are never rounded. Weights, the inputs of a
product and what comes out of it are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from evo_hpo.errors import ModelError
from evo_hpo.models.loading import LoadedModel, compute_dtype
from evo_hpo.models.structure import decoder_blocks, is_linear, outer_matrices

MIXED = "mixed"
"""What settings call it, beside the names of dtypes."""


class MixedLinear(nn.Linear):
    """A linear layer with a bfloat16 weight and float32 inputs, outputs and bias."""

    def forward(self, input: Tensor) -> Tensor:
        """Rounds the inputs and the products to bfloat16; the bias is added after that."""
        product = functional.linear(input.to(self.weight.dtype), self.weight).to(input.dtype)
        return product if self.bias is None else product + self.bias


class MixedEmbedding(nn.Embedding):
    """An embedding with a bfloat16 table and float32 outputs."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table, in float32."""
        return super().forward(input).float()


_MIXED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: MixedLinear, nn.Embedding: MixedEmbedding}


def matrix_dtype(name: str) -> torch.dtype:
    """Of matrices, which is that of everything but for ``mixed``; errors as :func:`compute_dtype`."""
    return torch.bfloat16 if name == MIXED else compute_dtype(name)


def load_in(name: str, load: Callable[[torch.dtype], LoadedModel]) -> LoadedModel:
    """A model in the dtype of this name, or mixed.

    Args:
        load: loads it in a dtype.

    Raises:
        ModelError: as :func:`compute_dtype` and :func:`mix`.
    """
    loaded = load(torch.float32 if name == MIXED else compute_dtype(name))
    if name == MIXED:
        mix(loaded.model)
    return loaded


def mix(model: nn.Module) -> None:
    """Gives a float32 model's linear layers, token embedding and head bfloat16 weights, in place.

    Raises:
        ModelError: a matrix that could be searched is of a class of its own, which may do more than multiply.
    """
    outer = outer_matrices(model)
    inside = {
        f"{name}.{part}": module
        for name, block in decoder_blocks(model).items()
        for part, module in block.named_modules()
        if is_linear(module)
    }
    for name, module in (inside | outer).items():
        if type(module) not in _MIXED:
            raise ModelError(
                f"{type(model).__name__}: {name!r} is a {type(module).__name__}, whose products cannot be taken in"
                " bfloat16 alone: use dtype 'bfloat16' or 'float32'"
            )
    weights = {id(module.weight) for module in (inside | outer).values()}
    for module in model.modules():
        if type(module) in _MIXED and id(module.weight) in weights:
            assert isinstance(module.weight, nn.Parameter)
            module.weight.data = module.weight.data.to(torch.bfloat16)  # also of another module that shares it
            module.__class__ = _MIXED[type(module)]


def arithmetic_of(model: nn.Module) -> str:
    """``mixed``, or the dtype of the model's weights."""
    if any(isinstance(module, MixedLinear) for module in model.modules()):
        return MIXED
    return str(next(model.parameters()).dtype).removeprefix("torch.")
