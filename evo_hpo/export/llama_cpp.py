"""A GGUF file in llama.cpp itself, through the shared object that `xllamacpp` carries (extra `gguf`).

llama.cpp's parameters are structures whose fields change from version to version. They are passed on as its own
defaults, in room that is larger than they are; only the leading fields of a context's, which have not moved, are set.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evo_hpo.errors import ModelError
from evo_hpo.levels.ggml import library

_Pointer = ctypes.c_void_p
_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _Pointer)
_said: list[str] = []  # what llama.cpp logs as an error


class _Parameters(ctypes.Structure):
    _fields_ = (("leading", ctypes.c_uint32 * 4), ("rest", ctypes.c_byte * 1008))


class _Batch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int32),
        *((name, _Pointer) for name in ("tokens", "embeddings", "positions", "counts", "sequences", "wanted")),
    )


class LlamaCpp:
    """One model in llama.cpp, on the CPU; a context manager.

    Args:
        context: most tokens of a sequence.
        threads: of the processor.

    Raises:
        ModelError: llama.cpp cannot load the file; its own words are in the message.
        MissingPackageError: the extra `gguf` is not installed.
    """

    def __init__(self, path: Path, context: int = 512, threads: int = 1) -> None:
        self._shared = _program()
        self.context = context
        self._read_until = 0
        _said.clear()
        self._model = self._shared.llama_model_load_from_file(
            str(path).encode(), self._shared.llama_model_default_params()
        )
        if not self._model:
            raise ModelError(f"llama.cpp cannot load {path}: {' '.join(_said) or 'no reason given'}")
        parameters = self._shared.llama_context_default_params()
        parameters.leading[:3] = [context, context, context]  # of the context, of a batch, of a step
        self._context = self._shared.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise ModelError(f"llama.cpp cannot run {path}: {' '.join(_said) or 'no reason given'}")
        self._shared.llama_set_n_threads(self._context, threads, threads)
        self._vocabulary = self._shared.llama_model_get_vocab(self._model)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._shared.llama_free(self._context)
        self._shared.llama_model_free(self._model)

    @property
    def vocabulary(self) -> int:
        """Number of tokens it knows."""
        return int(self._shared.llama_vocab_n_tokens(self._vocabulary))

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Of every position of one sequence, tokens x vocabulary."""
        self._forget()
        found = self._read(tokens, 0)
        return np.ctypeslib.as_array(found, (len(tokens), self.vocabulary)).copy()

    def nanoseconds(self, position: int) -> int:
        """How long one token takes that is decoded after `position` others, read first if they were not."""
        if position != self._read_until:
            self._forget()
            if position:
                self._read([1] * position, 0)
        start = time.perf_counter_ns()
        self._read([1], position)
        return time.perf_counter_ns() - start

    def _forget(self) -> None:
        self._read_until = 0
        self._shared.llama_memory_clear(self._shared.llama_get_memory(self._context), True)

    def _read(self, tokens: Sequence[int], position: int) -> Any:
        """Reads tokens that stand from a position on; where the logits of all of them lie."""
        count = len(tokens)
        ids, positions = np.asarray(tokens, dtype=np.int32), np.arange(position, position + count, dtype=np.int32)
        ones, wanted, zero = np.ones(count, dtype=np.int32), np.ones(count, dtype=np.int8), np.zeros(1, dtype=np.int32)
        sequences = np.full(count, zero.ctypes.data, dtype=np.uintp)
        arrays = (ids, None, positions, ones, sequences, wanted)
        batch = _Batch(count, *(None if array is None else array.ctypes.data for array in arrays))
        if self._shared.llama_decode(self._context, batch):
            raise ModelError(f"llama.cpp cannot read {position + count} tokens, its context holds {self.context}")
        self._read_until = position + count
        return self._shared.llama_get_logits(self._context)

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text; ``special``: with those that begin or end a sequence."""
        data = text.encode()
        found = np.zeros(len(data) + 16, dtype=np.int32)
        arguments = (data, len(data), found.ctypes.data, len(found), special, False)
        count = self._shared.llama_tokenize(self._vocabulary, *arguments)
        return [int(token) for token in found[: max(count, 0)]]


def forget(path: Path) -> None:
    """Has Linux forget what it holds of a file in memory: who maps it next gets it from the disk, in large pages.

    A file that was just written lies in what small pages were free, and is read from there up to half as slowly again.
    """
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file, suppress(OSError):  # some file systems cannot
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def declared(*signatures: tuple[str, Any, list[Any]]) -> Any:
    """The shared object, silent, with the signatures of what is called: name, result, arguments."""
    shared = library()
    for name, result, arguments in signatures:
        function = getattr(shared, name)
        function.restype, function.argtypes = result, arguments
    shared.llama_log_set.argtypes = [_Log, _Pointer]
    shared.llama_log_set(_log, None)
    return shared


@cache
def _program() -> Any:
    """The shared object with the signatures of what is called here."""
    integer, flag, text = ctypes.c_int32, ctypes.c_bool, ctypes.c_char_p
    shared = declared(
        ("llama_model_default_params", _Parameters, []),
        ("llama_context_default_params", _Parameters, []),
        ("llama_model_load_from_file", _Pointer, [text, _Parameters]),
        ("llama_init_from_model", _Pointer, [_Pointer, _Parameters]),
        ("llama_model_free", None, [_Pointer]),
        ("llama_free", None, [_Pointer]),
        ("llama_set_n_threads", None, [_Pointer, integer, integer]),
        ("llama_model_get_vocab", _Pointer, [_Pointer]),
        ("llama_vocab_n_tokens", integer, [_Pointer]),
        ("llama_get_memory", _Pointer, [_Pointer]),
        ("llama_memory_clear", None, [_Pointer, flag]),
        ("llama_decode", integer, [_Pointer, _Batch]),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [_Pointer]),
        ("llama_tokenize", integer, [_Pointer, text, integer, _Pointer, integer, flag, flag]),
    )
    shared.llama_backend_init()
    return shared


def _heard(level: int, message: bytes, _: object) -> None:
    if level >= 4:  # errors
        _said.append(message.decode(errors="replace").strip())


_log = _Log(_heard)  # kept: llama.cpp calls it as long as it runs
