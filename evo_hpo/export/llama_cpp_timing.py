"""llama.cpp on the CPU as a program whose latency is measured (extra `gguf`)."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from evo_hpo.errors import InvalidSettingError, MissingPackageError, StoreError
from evo_hpo.export.ggml_kernels import Kernel, any_blocks
from evo_hpo.export.gguf_file import write_gguf
from evo_hpo.export.llama_cpp import LlamaCpp
from evo_hpo.levels.ggml import zeros_type
from evo_hpo.levels.level_set import Choice, LevelSet
from evo_hpo.levels.packed_size import zeros_of_ggml
from evo_hpo.levels.packing import GgmlBlocks
from evo_hpo.models.loading import load_model, source_gguf
from evo_hpo.space.compression_space import Assignment

SPAN = 32
"""Tokens that are decoded before it starts again: with each, attention looks at one more."""


class LlamaCppProgram:
    """Products are ggml's; whole models are GGUF files of the sizes and types that an export has.

    What is in their blocks is made up: how long a token takes does not depend on it.

    Args:
        model: as in a plan; the file that it was read from is the template.

    Raises:
        MissingPackageError: the extra is not installed.
    """

    name = "llama.cpp"

    def __init__(self, model: str, threads: int = 1) -> None:
        try:
            self.version = f"of xllamacpp {version('xllamacpp')}"
        except PackageNotFoundError:
            raise MissingPackageError("timing llama.cpp needs it: pip install 'evo-hpo[gguf]'") from None
        self.threads = threads
        self._loaded = replace(load_model(model), tokenizer=None)  # which need not be one that llama.cpp has
        self._template = source_gguf(model)

    def product(self, choice: Choice, read: int) -> Kernel:
        """Raises InvalidSettingError for a level that is no ggml type."""
        rows, columns = choice.unit.shape
        return Kernel((rows, columns), _kind(choice), self.threads, read)

    @contextlib.contextmanager
    def model(self, levels: LevelSet, assignment: Assignment, depth: int) -> Iterator[Decoding]:
        """A file of it in llama.cpp; it is deleted at the end."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(path, self._loaded, _made_up(levels), assignment, template=self._template)
            with LlamaCpp(path, context=depth + SPAN + 1, threads=self.threads) as program:
                yield Decoding(program, depth)


class Decoding:
    """Tokens decoded one by one, the first after `depth` others, over and over."""

    def __init__(self, program: LlamaCpp, depth: int) -> None:
        self._program, self._depth, self._position = program, depth, depth

    def nanoseconds(self) -> float:
        found = float(self._program.nanoseconds(self._position))
        self._position = self._position + 1 if self._position < self._depth + SPAN else self._depth
        return found


@dataclass(frozen=True)
class _MadeUp:
    """Blocks of a layer's shape, whatever is in them."""

    shape: tuple[int, ...]
    kind: str

    def unit_weights(self, unit: str, label: str) -> Mapping[str, torch.Tensor | None]:
        raise StoreError(f"level {label} of {unit!r} has no weights here")

    def unit_encoded(self, unit: str, label: str) -> GgmlBlocks:
        rows, columns = self.shape
        return GgmlBlocks(self.kind, torch.from_numpy(any_blocks(rows, columns, self.kind)))


def _made_up(levels: LevelSet) -> LevelSet:
    """The same levels with blocks that are made up, in the same order."""
    rows = [(name, [list(map(_filled, level)) for level in choices]) for name, choices in levels.rows()]
    return LevelSet(rows, levels.resource)


def _filled(choice: Choice) -> Choice:
    if choice.level.settings.get("kind") == "dropped":
        return choice
    return replace(choice, source=_MadeUp(choice.unit.shape, _kind(choice)))


def _kind(choice: Choice) -> str:
    if zeros_of_ggml(choice.unit, choice.level):
        return zeros_type(choice.unit.shape[1])
    if choice.level.settings.get("kind") != "ggml":
        raise InvalidSettingError(
            f"llama.cpp runs no level {choice.level.label}: set method = 'ggml', or measure with --program torch"
        )
    return str(choice.level.settings["type"])
