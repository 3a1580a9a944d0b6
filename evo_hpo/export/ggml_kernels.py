"""How long llama.cpp's product of a matrix with one token's vector takes, on the CPU (extra `gguf`).

The matrices lie where llama.cpp has them when it has loaded a model: repacked in memory of its own where it has faster
kernels for that, otherwise in the pages of a file. A product may take a fifth longer elsewhere.
Each is read once a run, and all of them together are more than a processor's cache holds: decoding reads every weight
once a token, from memory.
"""

from __future__ import annotations

import ctypes
import mmap
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evo_hpo.export.llama_cpp import declared, forget
from evo_hpo.levels.ggml import ggml_number, quantize, row_bytes

_Pointer = ctypes.c_void_p
_ALIGNED = 32  # bytes, where a tensor begins in a GGUF file
_ROWS = 64  # that are quantized, and repeated: how long a product takes does not depend on what is in it


class _Room(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("at", _Pointer), ("only_names", ctypes.c_bool))


class Kernel:
    """Products of matrices of one shape and type with a vector; a context manager.

    Args:
        shape: outputs and inputs.
        kind: ggml type.
        read: bytes of matrices that a run reads at least.

    Raises:
        MissingPackageError: the extra is not installed.
    """

    def __init__(self, shape: Sequence[int], kind: str, threads: int = 1, read: int = 1) -> None:
        self._shared = shared = _kernels()
        rows, columns = shape
        self.copies = -(-read // (rows * row_bytes(kind, columns)))
        self._backend = shared.ggml_backend_cpu_init()
        shared.ggml_backend_cpu_set_n_threads(self._backend, threads)
        self._rooms: list[Any] = []
        self._buffers: list[Any] = []
        blocks = any_blocks(rows, columns, kind)
        for place in _places(self._backend):
            matrices = self._room(self.copies)
            made = [shared.ggml_new_tensor_2d(matrices, ggml_number(kind), columns, rows) for _ in range(self.copies)]
            if mapped := place == shared.ggml_backend_cpu_buffer_type():
                buffer = self._mapped(made, blocks)
            else:
                buffer = shared.ggml_backend_alloc_ctx_tensors_from_buft(matrices, place)
            self._buffers.append(buffer)
            vectors = self._room(2 * self.copies, graph=True)
            vector = shared.ggml_new_tensor_2d(vectors, 0, columns, 1)
            products = [shared.ggml_mul_mat(vectors, matrix, vector) for matrix in made]
            if shared.ggml_backend_supports_op(self._backend, products[0]):
                break
            shared.ggml_backend_buffer_free(self._buffers.pop())
        self.place = shared.ggml_backend_buft_name(place).decode()
        """Where the matrices are: ``CPU``, or ``CPU_REPACK`` where they are repacked."""
        self._graph = shared.ggml_new_graph_custom(vectors, 2 * self.copies + 8, False)
        for product in products:
            shared.ggml_build_forward_expand(self._graph, product)
        self._buffers.append(
            shared.ggml_backend_alloc_ctx_tensors_from_buft(vectors, shared.ggml_backend_cpu_buffer_type())
        )
        for matrix in () if mapped else made:
            shared.ggml_backend_tensor_set(matrix, blocks.ctypes.data, 0, blocks.nbytes)
        self.vector = np.random.default_rng(0).standard_normal(columns).astype(np.float32)
        shared.ggml_backend_tensor_set(vector, self.vector.ctypes.data, 0, self.vector.nbytes)
        self._last, self._rows = products[-1], rows

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in self._buffers:
            self._shared.ggml_backend_buffer_free(buffer)
        for room in self._rooms:
            self._shared.ggml_free(room)
        self._shared.ggml_backend_free(self._backend)

    def _mapped(self, matrices: Sequence[Any], blocks: npt.NDArray[np.uint8]) -> Any:
        """A buffer that is a file's pages, with a matrix's blocks again and again, as llama.cpp has a model's."""
        step = -(-blocks.nbytes // _ALIGNED) * _ALIGNED
        padded = blocks.tobytes().ljust(step, b"\0")
        with tempfile.NamedTemporaryFile() as file:
            for _ in matrices:
                file.write(padded)
            file.flush()
            forget(Path(file.name))
            self._file = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        start = self._file.ctypes.data
        buffer = self._shared.ggml_backend_cpu_buffer_from_ptr(start, self._file.nbytes)
        for number, matrix in enumerate(matrices):
            self._shared.ggml_backend_tensor_alloc(buffer, matrix, start + number * step)
        return buffer

    def nanoseconds(self) -> float:
        """Of one product, the mean over a run of all of them."""
        start = time.perf_counter_ns()
        self._shared.ggml_backend_graph_compute(self._backend, self._graph)
        return (time.perf_counter_ns() - start) / self.copies

    def outputs(self) -> npt.NDArray[np.float32]:
        """What the last product of a run gave."""
        found = np.empty(self._rows, dtype=np.float32)
        self._shared.ggml_backend_tensor_get(self._last, found.ctypes.data, 0, found.nbytes)
        return found

    def _room(self, tensors: int, *, graph: bool = False) -> Any:
        """Names of tensors, without their data; ``graph``: and one of the operations on them."""
        size = (tensors + 8) * self._shared.ggml_tensor_overhead()
        size += self._shared.ggml_graph_overhead_custom(tensors + 16, False) if graph else 0
        self._rooms.append(self._shared.ggml_init(_Room(size, None, True)))
        return self._rooms[-1]


@cache
def any_blocks(rows: int, columns: int, kind: str) -> npt.NDArray[np.uint8]:
    """Blocks of a matrix of this shape, whatever is in it."""
    some = quantize(torch.randn(min(rows, _ROWS), columns, generator=torch.Generator().manual_seed(0)), kind).numpy()
    return np.ascontiguousarray(np.resize(some, (rows, some.shape[1])))


def _places(backend: Any) -> list[Any]:
    """Kinds of memory that llama.cpp tries for a matrix, in its order."""
    shared = _kernels()
    device = shared.ggml_backend_get_device(backend)
    found = shared.ggml_backend_reg_get_proc_address(
        shared.ggml_backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
    )
    places: list[Any] = []
    if found:
        more = ctypes.CFUNCTYPE(ctypes.POINTER(_Pointer), _Pointer)(found)(device)
        while more and more[len(places)]:
            places.append(more[len(places)])
    return [*places, shared.ggml_backend_cpu_buffer_type()]


@cache
def _kernels() -> Any:
    """The shared object with the signatures of what is called here."""
    pointer, size, integer = _Pointer, ctypes.c_size_t, ctypes.c_int
    return declared(
        ("ggml_init", pointer, [_Room]),
        ("ggml_free", None, [pointer]),
        ("ggml_tensor_overhead", size, []),
        ("ggml_graph_overhead_custom", size, [size, ctypes.c_bool]),
        ("ggml_new_tensor_2d", pointer, [pointer, integer, ctypes.c_int64, ctypes.c_int64]),
        ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        ("ggml_new_graph_custom", pointer, [pointer, size, ctypes.c_bool]),
        ("ggml_build_forward_expand", None, [pointer, pointer]),
        ("ggml_backend_cpu_init", pointer, []),
        ("ggml_backend_cpu_set_n_threads", None, [pointer, integer]),
        ("ggml_backend_free", None, [pointer]),
        ("ggml_backend_get_device", pointer, [pointer]),
        ("ggml_backend_dev_backend_reg", pointer, [pointer]),
        ("ggml_backend_reg_get_proc_address", pointer, [pointer, ctypes.c_char_p]),
        ("ggml_backend_cpu_buffer_type", pointer, []),
        ("ggml_backend_buft_name", ctypes.c_char_p, [pointer]),
        ("ggml_backend_alloc_ctx_tensors_from_buft", pointer, [pointer, pointer]),
        ("ggml_backend_cpu_buffer_from_ptr", pointer, [pointer, size]),
        ("ggml_backend_tensor_alloc", integer, [pointer, pointer, pointer]),
        ("ggml_backend_buffer_free", None, [pointer]),
        ("ggml_backend_tensor_set", None, [pointer, pointer, size, size]),
        ("ggml_backend_tensor_get", None, [pointer, pointer, size, size]),
        ("ggml_backend_supports_op", ctypes.c_bool, [pointer, pointer]),
        ("ggml_backend_graph_compute", integer, [pointer, pointer]),
    )
