"""Causal attention by blocks of queries, in place of PyTorch's kernel where decoder blocks are compiled.

On a CPU the kernel takes a sixth of a decoder block's time in bfloat16 (sequences of 256 tokens) for a fortieth of its
arithmetic: it starts two small products for every head and 64 queries. Here all heads and sequences go through one
product a block of queries, which sees the keys up to its own last one, and a compiler makes loops of the softmax.
Scores are products and sums in float32, as the kernel's are; weights of values are rounded to 16 bits, as there,
and the output is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional

from evo_hpo.scoring.compile_lock import GUARD_LOCK
from evo_hpo.scoring.devices import has_matrix_units

QUERIES = 32
"""In one block. Fewer read fewer keys that a query does not see; more are fewer products."""

LENGTHS = range(4 * QUERIES, 513)
"""Of sequences that attend in this way: 0.5 to 0.6 of the kernel's time (9 heads of 64, 3 of keys; avx512_bf16)."""


@torch.library.custom_op("evo_hpo::hidden_keys", mutates_args=())
def hidden_keys(length: int) -> Tensor:
    """What is added to scores of the last block of queries: -inf where a key is later than the query, else 0.

    An operator of its own, or compiled code would work it out anew for every score.
    """
    rows = min(QUERIES, length)
    return torch.full((rows, length), float("-inf")).triu_(length - rows + 1)


@hidden_keys.register_fake
def _(length: int) -> Tensor:
    return torch.empty(min(QUERIES, length), length)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale x query key^T) value, where a position sees itself and earlier ones.

    Args:
        query: sequences x heads x length x size.
        key: sequences x groups x length x size; each group serves heads / groups neighbouring heads.
        value: sequences x groups x length x width.
        scale: default: 1 / sqrt(size).

    Returns:
        sequences x heads x length x width, in the dtype of ``value``.
    """
    sequences, heads, length, size = query.shape
    pairs, share = sequences * key.shape[1], heads // key.shape[1]
    queries = query.float().reshape(pairs, share, length, size)
    keys = key.float().reshape(pairs, length, size).transpose(1, 2)
    values, hidden = value.reshape(pairs, length, -1), hidden_keys(length)
    found = []
    for first in range(0, length, QUERIES):
        end = min(first + QUERIES, length)
        own = queries[:, :, first:end].reshape(pairs, -1, size)
        scores = torch.bmm(own, keys[:, :, :end]).view(pairs, share, end - first, end)
        scores = scores * (size**-0.5 if scale is None else scale) + hidden[first - end :, -end:]
        weights = torch.softmax(scores, -1).to(value.dtype).view(pairs, -1, end)
        found.append(torch.bmm(weights, values[:, :end]).view(pairs, share, end - first, -1))
    whole = torch.cat(found, 2).reshape(sequences, heads, length, -1)
    return whole.transpose(1, 2).contiguous().transpose(1, 2)  # in memory as the kernel gives it


def compile_with_attention(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend of ``torch.compile``: inductor, after attention in 16 bits on a CPU was replaced where it is faster."""
    from torch._dynamo import lookup_backend  # a second and 70 MB, for who compiles

    for node in graph.graph.find_nodes(op="call_function", target=functional.scaled_dot_product_attention):
        if _replaceable(node):
            node.target = causal_attention
            node.kwargs = {"scale": node.kwargs.get("scale")}
    graph.recompile()
    compiled = cast(Callable[..., Any], lookup_backend("inductor")(graph, list(inputs)))

    def run(*args: Any) -> Any:
        GUARD_LOCK.over()
        return compiled(*args)

    return run


def _example(argument: object) -> Tensor | None:
    found = argument.meta.get("example_value") if isinstance(argument, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def _replaceable(node: fx.Node) -> bool:
    """Whether a call is plain causal attention of whole sequences, of a dtype and length that gain by it."""
    given, plain = node.kwargs, {"attn_mask", "dropout_p", "scale", "is_causal", "enable_gqa"}
    if len(node.args) != 3 or not given.keys() <= plain:
        return False
    if given.get("is_causal") is not True or given.get("attn_mask") is not None or given.get("dropout_p", 0.0) != 0.0:
        return False
    query, key, value = map(_example, node.args)
    if query is None or key is None or value is None or has_matrix_units(query.device):
        return False  # where the kernel multiplies by AMX, nothing was measured
    return bool(
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.dim() == key.dim() == value.dim() == 4
        and query.shape[::2] == key.shape[::2] == value.shape[::2]
        and query.shape[2] in LENGTHS
        and key.shape[1] == value.shape[1]
        and (query.shape[1] == key.shape[1] or given.get("enable_gqa") is True)
    )
