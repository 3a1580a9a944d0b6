"""Weight matrices kept in the layout in which a CPU's library multiplies them, not rearranged for every product.

A product of 512 tokens with a layer of some million weights spends about a tenth of its time on rearranging them, again
for every sequence and candidate. MKL (float32) and oneDNN (bfloat16) can keep them rearranged ("packed"). For some
shapes they then add up in another order; those are recognised by trying, and left alone, so that no loss depends on
what was packed. The product is an operator of its own, ``evo_hpo::linear``, which finds the packed matrix by the
address of the weight: so compiled code has the weight itself as its input, and switching levels does not compile again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import cache
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from evo_hpo.models.mixed import MixedLinear, rounded_linear

_packed: WeakValueDictionary[tuple[int, torch.Size, int], Tensor] = WeakValueDictionary()
"""(Address and shape of a weight, rows of the other factor) -> packed weight, while a :class:`Prepacked` has it."""

LEAST_NUMBERS, NUMBERS_TRIED = 512, 1 << 14
"""A product of fewer numbers is left as it is; of others at least so many are compared before one is packed."""

_lock = threading.Lock()
_library = torch.library.Library("evo_hpo", "DEF")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.numel() // x.shape[-1]
    packed = _packed.get((weight.data_ptr(), weight.shape, rows))
    if packed is None or not (x.is_contiguous() and weight.is_contiguous()) or x.shape[-1] != weight.shape[1]:
        return functional.linear(x, weight, bias)
    return _multiply(x, packed, weight, bias, rows)


def _multiply(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    product: Tensor
    if weight.dtype == torch.float32:
        product = torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows)
    else:
        product = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


def _pack(weight: Tensor, rows: int) -> Tensor:
    single = weight.dtype == torch.float32
    pack = torch.ops.mkl._mkl_reorder_linear_weight if single else torch.ops.mkldnn._reorder_linear_weight
    packed: Tensor = pack(weight, rows)
    return packed


@cache
def _same_bits(outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> bool:
    """Whether packing leaves every bit of a product of this shape as it is, on one core; found by trying.

    Half of the trials are sums that cancel: what is left of them is the rounding of float32, which another order of
    adding up changes in nearly every number, where the bits of a 16-bit product would hide it.
    """
    if rows * outputs < LEAST_NUMBERS:
        return False
    try:
        return _agree(outputs, inputs, rows, dtype)
    except RuntimeError:  # a library that does not pack after all
        return False


def _agree(outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    for trial in range(max(2, NUMBERS_TRIED // (rows * outputs))):
        shapes = ((rows, inputs), (outputs, inputs), (outputs,))
        x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        if trial % 2:
            half = inputs // 2
            order = torch.randperm(2 * half, generator=generator)
            x[:, order] = torch.cat([x[:, :half], x[:, :half]], 1)
            weight[:, order] = torch.cat([weight[:, :half], -weight[:, :half]], 1)
            weight[:, 2 * half :] = 0
        packed = _pack(weight, rows)
        for b in (None, bias):
            if not torch.equal(functional.linear(x, weight, b), _multiply(x, packed, weight, b, rows)):
                return False
    return True


def _shape(x: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library.impl("linear", _on_cpu, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("evo_hpo::linear", _shape, lib=_library)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` without gradients, by the packed weight where there is one for so many rows.

    Where dtypes differ, as :func:`evo_hpo.models.mixed.rounded_linear`.
    """
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        return rounded_linear(x, weight, bias, linear)
    by_address = torch.compiler.is_compiling() or _packed  # what is compiled may meet a packed weight later
    if by_address and weight.is_cpu and weight.dtype in (torch.float32, torch.bfloat16):
        product: Tensor = torch.ops.evo_hpo.linear(x, weight, bias)
        return product
    return functional.linear(x, weight, bias)


def product_by(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """``x -> x weight^T`` (x: rows x inputs) for many x; for neighbours of as many rows it is rearranged only once.

    Other than :class:`Prepacked` it asks for no bits to stay as they were; they depend on nothing but x and the weight
    (outputs x inputs), which must not be written to while it is used.
    """
    packed: dict[int, Tensor] = {}

    def multiply(x: Tensor) -> Tensor:
        x, rows = x.contiguous(), len(x)
        if not (rows and _packable(weight)):
            return functional.linear(x, weight)
        if rows not in packed:
            packed.clear()
            packed[rows] = _pack(weight, rows)
        return _multiply(x, packed[rows], weight, None, rows)

    return multiply


class PrepackedLinear(nn.Linear):
    """A linear layer that multiplies by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``; without gradients."""
        return linear(input, self.weight, self.bias)


def use_prepacked(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Turns linear layers (of exactly that class, or mixed; on a CPU whose libraries pack them) into prepacked ones.

    Returns:
        Those that were turned; nothing is packed before :meth:`Prepacked.keep`.
    """
    kinds = (nn.Linear, MixedLinear)
    chosen: set[nn.Module] = {m for m in modules if type(m) in kinds and _packable(m.get_parameter("weight").data)}
    for module in chosen:
        module.__class__ = PrepackedLinear
    return chosen


class Prepacked:
    """Packed weights of one replica, one a name; replicas that keep the same weight share its packed copy.

    Args:
        limit: bytes of packed weights that may be kept; a weight that does not fit is multiplied as it is. The weights
            themselves are held too.

    Attributes:
        rows: sequences x positions of the products to come; 0: nothing is packed.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.rows = limit, 0
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}  # the weight too: its address may not be used by another
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def expect(self, rows: int) -> bool:
        """Sets the rows; True when they have changed, and with them everything that was kept is gone."""
        changed = rows != self.rows
        if changed:
            self.clear()
            self.rows = rows
        return changed

    def keep(self, name: str, weight: Tensor) -> None:
        """Packs a weight (outputs x inputs) in place of the name's last one; it must not be written to any more.

        Nothing happens where the product's bits would change. Call it while operations run on one core.
        """
        if not self.rows or not _packable(weight):
            return
        kept = self._kept.get(name)
        if kept is not None and kept[0].data_ptr() == weight.data_ptr():
            return
        more = weight.nbytes - (0 if kept is None else kept[0].nbytes)
        if self._bytes + more > self.limit:
            return
        with _lock:
            if not _same_bits(*weight.shape, self.rows, weight.dtype):
                return
            key = (weight.data_ptr(), weight.shape, self.rows)
            packed = _packed.get(key)
            if packed is None:
                packed = _packed[key] = _pack(weight, self.rows)
        self._kept[name] = (weight, packed)
        self._bytes += more

    def clear(self) -> None:
        """Forgets all."""
        self._kept.clear()
        self._bytes = 0


def _packable(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dim() == 2 and weight.is_contiguous() and _packs(weight.dtype)


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether a library of this CPU packs matrices of this dtype."""
    if dtype == torch.float32:
        return bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]
    if dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False
