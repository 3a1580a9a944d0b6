"""Quantization as compressors: GPTQ, llama.cpp's own types, and round-to-nearest for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.compressor import CompressedLevel, Compressor, Inputs, Needs
from evo_hpo.levels.factor import check_damping, output_energy
from evo_hpo.levels.ggml import GGML_TYPES, fitting, ggml_type, library, quantize
from evo_hpo.levels.ggml_feedback import BITS, with_feedback
from evo_hpo.levels.gptq import GPTQSettings, check_bits, gptq
from evo_hpo.levels.grid import GridSettings
from evo_hpo.levels.packing import GgmlBlocks, Quantized
from evo_hpo.levels.rtn import round_to_nearest


class GPTQ(Compressor):
    """GPTQ at several bit-widths from one factorisation.

    Args:
        bits: bit-widths, each from 1 to 8.
        group_size: input columns that share a scale in each row; 0 or None: one scale a row.
        symmetric: zero point in the middle of the grid instead of a fitted one.
        static_groups: grids are fitted to the original weights; False: to the corrected ones, as the walk reaches them.
        activation_order: walk columns by falling diagonal of H.
        damping: added to H's diagonal, as a fraction of its mean.
    """

    name = "gptq"
    needs = "hessian"

    def __init__(
        self,
        bits: Sequence[int] = (2, 3, 4, 5, 6),
        *,
        group_size: int | None = 64,
        symmetric: bool = False,
        static_groups: bool = True,
        activation_order: bool = False,
        damping: float = 0.01,
    ) -> None:
        check_damping(damping)
        self.bits = tuple(sorted(check_bits(bits)))
        self.gptq = GPTQSettings(GridSettings(group_size or None, symmetric), static_groups)
        self.activation_order = activation_order
        self.damping = damping

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(map(str, self.bits))

    def compress(self, weight: torch.Tensor, inputs: Inputs) -> list[CompressedLevel]:
        weight = weight.float()
        hessian = inputs.factor.hessian
        energy = output_energy(weight, hessian) or 1.0
        levels = gptq(weight, inputs.factor, self.bits, self.gptq)
        return [_level(level, output_energy(weight - level.decode(), hessian) / energy) for level in levels]

    def settings(self) -> dict[str, Any]:
        grid = asdict(self.gptq.grid)
        order = {"static_groups": self.gptq.static_groups, "activation_order": self.activation_order}
        return {"bits": list(self.bits), **grid, **order, "damping": self.damping}


class RTN(Compressor):
    """Round to nearest: data-free, every weight on its own."""

    name = "rtn"
    needs = "nothing"

    def __init__(
        self, bits: Sequence[int] = (2, 3, 4, 5, 6), *, group_size: int | None = 64, symmetric: bool = False
    ) -> None:
        self.bits = tuple(sorted(check_bits(bits)))
        self.grid = GridSettings(group_size or None, symmetric)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(map(str, self.bits))

    def compress(self, weight: torch.Tensor, inputs: Inputs) -> list[CompressedLevel]:
        weight = weight.float()
        energy = float(weight.square().sum()) or 1.0
        levels = [round_to_nearest(weight, bits, self.grid) for bits in self.bits]
        return [_level(level, float((weight - level.decode()).square().sum()) / energy) for level in levels]

    def settings(self) -> dict[str, Any]:
        return {"bits": list(self.bits), **asdict(self.grid)}


class Ggml(Compressor):
    """Types of ggml as llama.cpp quantizes them (extra `gguf`), columns weighted by the diagonal of H.

    Args:
        types: Q4_K, IQ4_NL, ...; a layer gets those whose blocks divide its columns.
        embedding: the token embedding and the output head are units too; one, where they are one matrix. Columns of the
            head are weighted by its inputs, those of an embedding that is no head are not.
        feedback: codes of Q4_0 and Q5_0 in layers by GPTQ's error feedback, in llama.cpp's scales;
            see :mod:`evo_hpo.levels.ggml_feedback`.

    Raises:
        MissingPackageError: the extra `gguf` is not installed.
    """

    name = "ggml"
    needs: Needs = "diagonal"

    def __init__(
        self,
        types: Sequence[str] = ("Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "Q5_0", "Q6_K", "Q8_0"),
        *,
        embedding: bool = False,
        feedback: bool = False,
    ) -> None:
        for name, value in (("embedding", embedding), ("feedback", feedback)):
            if not isinstance(value, bool):
                raise InvalidSettingError(f"{name}={value!r} must be true or false")
        self.embedding, self.feedback, self.activation_order = embedding, feedback, feedback
        self.needs = "hessian" if feedback else "diagonal"
        self.types = tuple(sorted({ggml_type(name) for name in types}, key=GGML_TYPES.index))
        if not self.types:
            raise InvalidSettingError(f"types=[] must be some of {', '.join(GGML_TYPES)}")
        if feedback and not BITS.keys() & set(self.types):
            raise InvalidSettingError(
                f"feedback=True changes {' and '.join(BITS)} alone, and the types are {', '.join(self.types)}: add"
                " one of them, or leave it out"
            )
        library()

    @property
    def labels(self) -> tuple[str, ...]:
        return self.types

    @property
    def everywhere(self) -> tuple[str, ...]:
        return ()

    def offered(self, rows: int, columns: int) -> tuple[str, ...]:
        return fitting(self.types, columns)

    def unfit(self, rows: int, columns: int) -> str:
        return f"rows of {columns} weights are no multiple of the blocks"

    def compress(self, weight: torch.Tensor, inputs: Inputs) -> list[CompressedLevel]:
        weight, squares = weight.float(), importance(inputs)
        known = self.feedback and inputs.correlated

        def energy(values: torch.Tensor) -> float:
            if known:
                return output_energy(values, inputs.factor.hessian)
            return float((values.square() * squares).double().sum())

        whole = energy(weight) or 1.0
        found = []
        for name in self.offered(*weight.shape):
            data = quantize(weight, name, squares)
            if known and name in BITS:
                data = with_feedback(weight, data, name, inputs.factor)
            blocks = GgmlBlocks(name, data)
            error = energy(weight - blocks.decode().to(weight.device)) / whole
            found.append(CompressedLevel(name, blocks, blocks.storage_bits, weight.numel(), error))
        return found

    def settings(self) -> dict[str, Any]:
        own = {"embedding": self.embedding, "feedback": self.feedback}
        return {"types": list(self.types)} | {name: True for name, chosen in own.items() if chosen}


def importance(inputs: Inputs) -> torch.Tensor:
    """What llama.cpp weights each column's squared error with: the mean square of its input, 1 on average."""
    mean = inputs.diagonal.mean()
    return inputs.diagonal / mean if mean > 0 else torch.ones_like(inputs.diagonal)  # an expert without any token


def _level(quantized: Quantized, error: float) -> CompressedLevel:
    weights = quantized.codes.numel()
    return CompressedLevel(str(quantized.bits), quantized.pack(), quantized.bits * weights, weights, error)
