"""Compressed weights as they are stored: bit-packed codes, or a bit mask with the values that are left.

A matrix of b-bit codes is cut into planes of 4, 2 and 1 bits (b = 3 is 2 + 1). In each plane the first byte holds the
codes 0, n/k, 2n/k ... of the flattened matrix, so that unpacking writes contiguous runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from evo_hpo.errors import StoreError
from evo_hpo.levels.ggml import dequantize

__all__ = [
    *("Encoded", "GgmlBlocks", "PackedQuantized", "PackedSparse"),
    *("Quantized", "decode_record", "pack_bits", "unpack_bits"),
]

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
        return _dequantize(self.codes, self.scale, self.zero, self.group_size, self.group_of, dtype)

    def pack(self) -> PackedQuantized:
        """The same weights in the form in which they are stored."""
        fixed = self.symmetric or self.bits == 1
        scale = torch.ldexp(self.scale, torch.tensor(-self.exponent)).half()
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
        codes = unpack_bits(self.codes, self.bits, rows * columns).view(rows, columns)
        scale = torch.ldexp(self.scale.float(), torch.tensor(self.exponent))
        fixed = 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))
        zero = torch.full_like(scale, fixed) if self.zero is None else self.zero.float()
        return _dequantize(codes, scale, zero, self.group_size, self.group_of, dtype)

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
        dense = torch.zeros(rows * columns, dtype=dtype, device=self.values.device)
        return dense.masked_scatter_(mask, self.values.to(dtype)).view(rows, columns)

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


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The codes (flat, uint8) that `pack_bits` packed."""
    padded = -(-count // 8) * 8
    if packed.numel() * 8 != padded * bits:
        raise StoreError(f"{packed.numel()} bytes cannot hold {count} codes of {bits} bits: the store is damaged")
    codes, shift, begin = packed[:0], 0, 0
    for width in _planes(bits):
        plane = packed[begin : begin + padded * width // 8]
        part = torch.empty(8 // width, plane.numel(), dtype=torch.uint8, device=packed.device)
        for slot in range(len(part)):
            torch.bitwise_right_shift(plane, slot * width, out=part[slot])
        if width < 8:
            part &= 2**width - 1
        flat = part.view(-1)
        codes = flat if shift == 0 else codes.bitwise_or_(flat.bitwise_left_shift_(shift))
        begin += plane.numel()
        shift += width
    return codes[:count]


def _planes(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if (bits & width)]


def _dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    group_size: int,
    group_of: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    rows, columns = codes.shape
    if group_of is None and columns % group_size == 0:
        grouped = codes.view(rows, -1, group_size).to(torch.float32)
        return grouped.sub_(zero.unsqueeze(2)).mul_(scale.unsqueeze(2)).view(rows, columns).to(dtype)
    index = torch.arange(columns, device=codes.device) // group_size if group_of is None else group_of.long()
    return codes.to(torch.float32).sub_(zero[:, index]).mul_(scale[:, index]).to(dtype)
