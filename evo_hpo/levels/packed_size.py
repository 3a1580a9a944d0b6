"""What a level takes in the file that is exported, in bytes.

Quantized levels are packed as compressed-tensors does: codes of each row in whole 32-bit words, half-precision scales,
packed zero points, and the shape; every other level is dense there, 2 bytes a weight, zeros included. In a GGUF file
a dropped layer is a matrix of zeros too, of a type of few bits.
"""

from __future__ import annotations

from evo_hpo.levels.ggml import row_bytes, zeros_type
from evo_hpo.levels.manifest import LevelRecord, UnitRecord

HEADER = 90
"""Bytes that a tensor takes in a file beside its data and its name, at most."""


def scheme(unit: UnitRecord, level: LevelRecord) -> tuple[int, bool, int] | None:
    """Bits, whether it has zero points, and the columns that share a scale; None where weights are dense."""
    settings = level.settings
    if settings.get("kind") != "quantized":
        return None
    return int(settings["bits"]), has_zero_points(unit, level), int(settings["group_size"])


def has_zero_points(unit: UnitRecord, level: LevelRecord) -> bool:
    """Whether a quantized level stores zero points; records say it by the bits that the level takes."""
    return _beside_codes(unit, level) > 0


def follows_columns(unit: UnitRecord, level: LevelRecord) -> bool | None:
    """Whether consecutive columns share a scale; or else the level stores a number for each column.

    None: its record fits both, zero points and no such numbers, or no zero points and a number for each column.
    """
    rows, columns = unit.shape
    beside, zeros = _beside_codes(unit, level), 8 * rows * -(-columns // int(level.settings["group_size"]))
    return None if beside == zeros == 32 * columns else beside in (0, zeros)


def _beside_codes(unit: UnitRecord, level: LevelRecord) -> int:
    """Bits that a quantized level stores beside codes and scales."""
    settings, (rows, columns) = level.settings, unit.shape
    codes = -(-rows * columns // 8) * int(settings["bits"]) * 8
    return level.storage - codes - 16 * rows * -(-columns // int(settings["group_size"]))


def zeros_of_ggml(unit: UnitRecord, level: LevelRecord) -> bool:
    """Whether a level is that of a dropped layer whose others are ggml types: a GGUF file holds it as zeros."""
    return level.settings.get("kind") == "dropped" and any(one.settings.get("kind") == "ggml" for one in unit.levels)


def file_bytes(unit: UnitRecord, level: LevelRecord) -> int:
    """Bytes of a level's tensors in the exported file, with their entries in its header."""
    name = len(unit.name)
    found = scheme(unit, level)
    if level.settings.get("kind") == "ggml":
        return -(-level.storage // 256) * 32  # a tensor of a GGUF file begins at a multiple of 32 bytes
    if zeros_of_ggml(unit, level):
        return -(-unit.shape[0] * row_bytes(zeros_type(unit.shape[1]), unit.shape[1]) // 32) * 32
    if found is None:
        return 2 * unit.size + name + len(".weight") + HEADER
    bits, zeros, size = found
    rows, columns = unit.shape
    groups = -(-columns // size)
    data = 4 * rows * -(-columns * bits // 32) + 2 * rows * groups + 16
    data += 4 * -(-rows * bits // 32) * groups if zeros else 0
    return data + (3 + zeros) * (name + len(".weight_zero_point") + HEADER)
