"""ggml types: llama.cpp's own quantization, reached in the shared object that `xllamacpp` carries (extra `gguf`).

Blocks are what a GGUF file holds. They are decoded by llama.cpp's functions where the extra is installed, and otherwise
by those of the package `gguf`; the two agree bit for bit.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from evo_hpo.errors import InvalidSettingError, MissingPackageError

GGML_TYPES = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "MXFP4", "IQ4_NL"),
    *("NVFP4", "Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0", "BF16", "F16"),
)
"""Types that can be levels, by rising bits a weight."""

Blocks = npt.NDArray[np.uint8]

_EXPERT = re.compile(r"(.*\.)?layers\.(\d+)\.\w+\.experts\.\d+\.(gate|up|down)_proj\.weight$")


def ggml_type(name: str) -> str:
    """A type's name as it is written here, whatever the case.

    Raises:
        InvalidSettingError: there is no such type.
    """
    found = str(name).upper()
    if found not in GGML_TYPES:
        raise InvalidSettingError(
            f"no ggml type {name!r}: use some of {', '.join(GGML_TYPES)} (names like Q4_K_M are mixtures of them)"
        )
    return found


def block_size(name: str) -> int:
    """Weights that share a block: the columns of a matrix must be a multiple of it."""
    return int(gguf.GGML_QUANT_SIZES[ggml_number(name)][0])


def ggml_inputs(name: str) -> str:
    """The type that a CPU rounds the inputs of a matrix to before it multiplies; empty where it rounds nothing.

    Q8_1, which types with minima take, is Q8_0 with each block's sum beside it.
    """
    size = block_size(name)
    return "Q8_K" if size == 256 else "Q8_0" if size > 1 else name if name in ("F16", "BF16") else ""


def row_bytes(name: str, columns: int) -> int:
    """Bytes that a row takes."""
    block, size = gguf.GGML_QUANT_SIZES[ggml_number(name)]
    return columns // int(block) * int(size)


def zeros_type(columns: int) -> str:
    """The type that a GGUF file holds a dropped matrix in: zeros, which a program multiplies like all others."""
    return "F16" if columns % block_size("Q4_0") else "Q4_0"


def quantize(weight: torch.Tensor, name: str, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The blocks (uint8, rows x bytes) of a matrix, rows x columns, as llama.cpp quantizes it.

    Args:
        importance: weight of each column's squared error, llama.cpp's "importance matrix"; None: all alike. Some types
            need one.

    Raises:
        MissingPackageError: the extra is not installed.
    """
    shared, number = library(), int(ggml_number(name))
    rows, columns = weight.shape
    source = np.ascontiguousarray(weight.detach().float().cpu().numpy())
    target = np.zeros((rows, row_bytes(name, columns)), dtype=np.uint8)
    if importance is None and shared.ggml_quantize_requires_imatrix(number):
        importance = torch.ones(columns)
    weights = None if importance is None else np.ascontiguousarray(importance.float().cpu().numpy())
    shared.ggml_quantize_init(number)  # tables that the threads share
    threads = torch.get_num_threads()
    step = max(1, -(-rows // (4 * threads)))

    def part(start: int) -> None:
        count = min(step, rows - start)
        pointer = None if weights is None else weights.ctypes.data
        arguments = (source[start:].ctypes.data, target[start:].ctypes.data, 0, count, columns, pointer)
        shared.ggml_quantize_chunk(number, *arguments)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(0, rows, step)))
    return torch.from_numpy(target)


def dequantize(blocks: torch.Tensor, name: str) -> torch.Tensor:
    """The weights (float32, rows x columns) that llama.cpp reads in blocks, rows x bytes."""
    data: Blocks = np.ascontiguousarray(blocks.cpu().numpy())
    decode = _decoder(name)
    if decode is None:
        return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(data, ggml_number(name))))
    block, size = gguf.GGML_QUANT_SIZES[ggml_number(name)]
    found = np.empty((data.shape[0], data.shape[1] // size * block), dtype=np.float32)
    decode(data.ctypes.data, found.ctypes.data, found.size)
    return torch.from_numpy(found)


@cache
def library() -> Any:
    """llama.cpp's shared object.

    Raises:
        MissingPackageError: the extra is not installed.
    """
    path = _shared_object()
    if path is None:
        raise MissingPackageError("quantizing to ggml types needs llama.cpp: pip install 'evo-hpo[gguf]'")
    shared = ctypes.CDLL(str(path))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    shared.ggml_quantize_init.argtypes = [ctypes.c_int]
    shared.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    shared.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    shared.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    shared.ggml_quantize_chunk.restype = ctypes.c_size_t
    shared.ggml_row_size.argtypes = [ctypes.c_int, count]
    shared.ggml_row_size.restype = ctypes.c_size_t
    shared.ggml_type_name.argtypes = [ctypes.c_int]
    shared.ggml_type_name.restype = ctypes.c_char_p
    for name in GGML_TYPES:
        if shared.ggml_row_size(int(ggml_number(name)), 256) != row_bytes(name, 256):
            raise MissingPackageError(f"xllamacpp and gguf have other blocks of {name}: install the versions pinned")
    return shared


def _shared_object() -> Path | None:
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        return None
    return next(iter(sorted(Path(found.origin).parent.glob("xllamacpp*.so"))), None)


@cache
def _decoder(name: str) -> Callable[[int, int, int], None] | None:
    if _shared_object() is None:
        return None
    try:
        found: Any = library()[f"dequantize_row_{library().ggml_type_name(int(ggml_number(name))).decode()}"]
    except AttributeError:  # F16 and BF16 are no blocks
        return None
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    return found  # type: ignore[no-any-return]


def ggml_number(name: str) -> Any:
    """ggml's number of a type."""
    return gguf.GGMLQuantizationType[name]


def tensor_names(architecture: str, blocks: int) -> Callable[[str], str | None]:
    """Name of a parameter in transformers -> of its tensor in a GGUF file, which experts of a block share."""
    number = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    names = gguf.get_tensor_name_map(number, blocks)

    def named(parameter: str) -> str | None:
        if expert := _EXPERT.match(parameter):
            return f"blk.{expert[2]}.ffn_{expert[3]}_exps.weight"
        return names.get_name(parameter, (".weight", ".bias"))

    return named


def fitting(names: Sequence[str], columns: int) -> tuple[str, ...]:
    """The types whose blocks divide rows of so many columns."""
    return tuple(name for name in names if columns % block_size(name) == 0)
