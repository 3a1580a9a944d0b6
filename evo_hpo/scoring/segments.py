"""What a pass through the model leaves for the way back: one graph for each block, cut off from its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


@dataclass(frozen=True)
class Noted:
    """A member that ran within a graph.

    Attributes:
        edge: where the gradient of its output arises.
        tell: takes that gradient.
    """

    edge: GradientEdge
    tell: Callable[[Tensor], None]

    @classmethod
    def of(cls, output: Tensor, tell: Callable[[Tensor], None]) -> Noted:
        """Of an output that requires a gradient."""
        node = output.grad_fn
        return cls(GradientEdge(node, output.output_nr) if node else get_gradient_edge(output), tell)


@dataclass
class Segment:
    """A block's part of the graph.

    Attributes:
        leaf: its input, cut off from the block before.
        tail: its output as the next block sees it.
        output: its output with the graph; None: not kept.
        again: runs the block on ``leaf``.
        real: runs its own code on ``leaf``, also where it is dropped.
        noted: members that ran in it, where the graph is kept.
    """

    name: str
    leaf: Tensor
    tail: Tensor
    output: Tensor | None
    again: Callable[[], Any]
    real: Callable[[], Any]
    noted: list[Noted]


@dataclass
class Run:
    """Some of a replica's sequences, on their way through the model and back.

    Attributes:
        rows: their places among the replica's.
        segments: of the blocks, in order; taken off the end on the way back.
        front: input of the first block, with the graph from the embedding on.
        before, after: members that ran in front of the first block, and behind the last one. Blocks may read what the
            former give by way of other arguments too.
        gradient: of the output of the last segment that is left.
    """

    rows: slice
    segments: list[Segment] = field(default_factory=list)
    front: Tensor | None = None
    before: list[Noted] = field(default_factory=list)
    after: list[Noted] = field(default_factory=list)
    gradient: Tensor | None = None


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of what a graph of a block saves, each storage once and without the block's weights.

    What it saves has no graph: by way of a hook a node would hold its own output, and outlive its block's pass where
    nothing is read back through it, as of the norm before a dropped module.
    """

    def __init__(self, block: nn.Module) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in (*block.parameters(), *block.buffers())}
        self._storages: dict[int, int] = {}
        super().__init__(self._note, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()


def gradients_within(output: Tensor, gradient: Tensor, leaf: Tensor, noted: Sequence[Noted]) -> list[Tensor | None]:
    """Of what members between a leaf and the output gave, and at last of the leaf, from that of the output.

    None: it does not reach the output.
    """
    edges = [each.edge for each in noted]
    return [*torch.autograd.grad(output, [*edges, get_gradient_edge(leaf)], gradient, allow_unused=True)]


def tell(noted: Sequence[Noted], found: list[Tensor | None]) -> Tensor:
    """Tells members their gradients, the last one first, each of which can be freed then; gives back the leaf's."""
    leaf = found.pop()
    assert leaf is not None
    with torch.no_grad():
        for each in reversed(noted):
            if (own := found.pop()) is not None:
                each.tell(own)
    return leaf
