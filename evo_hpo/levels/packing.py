"""Compressed weights as they are stored: bit-packed codes, or a bit mask with the values that are left.

A matrix of b-bit codes is cut into planes of 4, 2 and 1 bits (b = 3 is 2 + 1). In each plane the first byte holds the
codes 0, n/k, 2n/k ... of the flattened matrix, so that unpacking writes contiguous runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from evo_hpo.errors import StoreError
from evo_hpo.levels.ggml import dequantize
from evo_hpo.levels.lasting import lasting

AT_A_TIME = 1 << 18
"""Weights that a CPU decodes at a time: what lies between codes and weights stays in its cache, and off the heap."""

_ROUNDING = 1e-4
"""Relative squared error that only a value outside a dtype's range brings about: bfloat16 itself stays below 1e-5."""


@dataclass(frozen=True)
class Quantized:
    """One layer at one bit-width, unpacked: codes rows x columns (uint8), scale and zero rows x groups (float32)."""

    bits: int
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    exponent: int
    group_size: int
    group_of: torch.Tensor | None = None
    symmetric: bool = False

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights, rows x columns."""
        return _dequantize(self.codes, self.scale, self.zero, self.group_size, self.group_of).to(dtype)

    def pack(self) -> PackedQuantized:
        """The same weights in the form in which they are stored."""
        fixed = self.symmetric or self.bits == 1
        scale = (self.scale * 2.0**-self.exponent).half()
        return PackedQuantized(
            bits=self.bits,
            shape=(self.codes.shape[0], self.codes.shape[1]),
            exponent=self.exponent,
            group_size=self.group_size,
            codes=pack_bits(self.codes.reshape(-1), self.bits),
            scale=scale.cpu(),
            zero=None if fixed else self.zero.to(torch.uint8).cpu(),
            group_of=None if self.group_of is None else self.group_of.to("cpu", copy=True),  # no two levels share it
        )


class Encoded:
    """A compressed weight matrix, rows (outputs) x columns (inputs)."""

    kind = ""

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights in `dtype`."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        held = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in held.items()})  # type: ignore[type-var]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is written to disk."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What is written to the manifest, JSON-ready."""
        raise NotImplementedError

    @property
    def storage_bits(self) -> int:
        """Bits that the tensors take, scales, zero points and masks included."""
        return sum(8 * tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


@dataclass(frozen=True)
class PackedQuantized(Encoded):
    """Bit-packed codes, half-precision scales (times 2 ** exponent), 8-bit zero points where they are not fixed."""

    bits: int
    shape: tuple[int, int]
    exponent: int
    group_size: int
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    group_of: torch.Tensor | None = None

    kind = "quantized"

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        rows, columns = self.shape
        found = lasting(rows, columns, dtype, self.codes.device)
        scale = self.scale.float() * 2.0**self.exponent
        fixed = 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))
        zero = torch.full_like(scale, fixed) if self.zero is None else self.zero.float()
        for part in _row_parts(found):
            codes = unpack_bits(self.codes, self.bits, rows * columns, part.start * columns, part.stop * columns)
            codes = codes.view(-1, columns)
            found[part] = _dequantize(codes, scale[part], zero[part], self.group_size, self.group_of)
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        optional = {"zero": self.zero, "group_of": self.group_of}
        return {"codes": self.codes, "scale": self.scale, **{k: v for k, v in optional.items() if v is not None}}

    def settings(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "bits": self.bits,
            "shape": list(self.shape),
            "exponent": self.exponent,
            "group_size": self.group_size,
        }


@dataclass(frozen=True)
class PackedSparse(Encoded):
    """One bit a weight, and the weights that are kept."""

    shape: tuple[int, int]
    mask: torch.Tensor
    values: torch.Tensor

    kind = "sparse"

    @classmethod
    def from_dense(cls, weight: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype = torch.float16) -> PackedSparse:
        """Encode `weight` where `mask` (True: kept) is set; both rows x columns.

        Values are rounded to `dtype`, or kept in float32 where it has not their range (above 65504, or mostly below
        6e-5, in float16).
        """
        kept = weight[mask].float()
        values = kept.to(dtype)
        lost = (values.double() - kept.double()).square().sum()
        if not bool(lost <= _ROUNDING * kept.double().square().sum()):
            values = kept
        return cls(
            shape=(weight.shape[0], weight.shape[1]),
            mask=pack_bits(mask.reshape(-1).to(torch.uint8), 1),
            values=values.cpu(),
        )

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        rows, columns = self.shape
        mask = unpack_bits(self.mask, 1, rows * columns).bool()
        dense = lasting(rows, columns, dtype, self.values.device).zero_()
        dense.view(-1).masked_scatter_(mask, self.values.to(dtype))
        return dense

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"mask": self.mask, "values": self.values}

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape)}


@dataclass(frozen=True)
class GgmlBlocks(Encoded):
    """Blocks of a ggml type as a GGUF file holds them: uint8, rows x bytes."""

    type: str
    blocks: torch.Tensor

    kind = "ggml"

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return dequantize(self.blocks, self.type).to(self.blocks.device, dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"blocks": self.blocks}

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "type": self.type}


def decode_record(settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Encoded:
    """Rebuild what `Encoded.settings` and `Encoded.tensors` describe."""
    if settings["kind"] == GgmlBlocks.kind:
        return GgmlBlocks(str(settings["type"]), tensors["blocks"])
    shape = (int(settings["shape"][0]), int(settings["shape"][1]))
    if settings["kind"] == PackedSparse.kind:
        return PackedSparse(shape, tensors["mask"], tensors["values"])
    if settings["kind"] != PackedQuantized.kind:
        raise StoreError(f"level of unknown kind {settings['kind']!r}: the store was written by a newer version")
    return PackedQuantized(
        bits=int(settings["bits"]),
        shape=shape,
        exponent=int(settings["exponent"]),
        group_size=int(settings["group_size"]),
        codes=tensors["codes"],
        scale=tensors["scale"],
        zero=tensors.get("zero"),
        group_of=tensors.get("group_of"),
    )


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned codes below 2 ** bits (flat, uint8) into bytes; ceil(n / 8) * bits bytes."""
    padded = torch.zeros(-(-codes.numel() // 8) * 8, dtype=torch.uint8)
    padded[: codes.numel()] = codes.cpu()
    planes, shift = [], 0
    for width in _planes(bits):
        part = ((padded >> shift) & (2**width - 1)).view(8 // width, -1)
        packed = part[0].clone()
        for slot in range(1, len(part)):
            packed |= part[slot] << (slot * width)
        planes.append(packed)
        shift += width
    return torch.cat(planes)


def unpack_bits(packed: torch.Tensor, bits: int, count: int, first: int = 0, last: int | None = None) -> torch.Tensor:
    """The codes (flat, uint8) that `pack_bits` packed, `count` in all: from `first` to before `last`."""
    padded, last = -(-count // 8) * 8, count if last is None else last
    if packed.numel() * 8 != padded * bits:
        raise StoreError(f"{packed.numel()} bytes cannot hold {count} codes of {bits} bits: the store is damaged")
    codes, shift, begin = packed[:0], 0, 0
    for width in _planes(bits):
        size = padded * width // 8
        plane = packed[begin : begin + size]
        flat = torch.empty(last - first, dtype=torch.uint8, device=packed.device)
        for slot in range(first // size, -(-last // size)):
            low, high = max(first, slot * size), min(last, (slot + 1) * size)
            run = plane[low - slot * size : high - slot * size]
            torch.bitwise_right_shift(run, slot * width, out=flat[low - first : high - first])
        if width < 8:
            flat &= 2**width - 1
        codes = flat if shift == 0 else codes.bitwise_or_(flat.bitwise_left_shift_(shift))
        begin += size
        shift += width
    return codes


def _row_parts(matrix: torch.Tensor) -> Iterator[slice]:
    """Rows that are decoded together: all of them on a GPU."""
    rows, columns = matrix.shape
    step = max(1, AT_A_TIME // max(columns, 1)) if matrix.device.type == "cpu" else max(rows, 1)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _planes(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if (bits & width)]


def _dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    group_size: int,
    group_of: torch.Tensor | None,
) -> torch.Tensor:
    """The weights in float32."""
    rows, columns = codes.shape
    if group_of is None and columns % group_size == 0:
        grouped = codes.view(rows, -1, group_size).to(torch.float32)
        return grouped.sub_(zero.unsqueeze(2)).mul_(scale.unsqueeze(2)).view(rows, columns)
    index = torch.arange(columns, device=codes.device) // group_size if group_of is None else group_of.long()
    return codes.to(torch.float32).sub_(zero[:, index]).mul_(scale[:, index])
