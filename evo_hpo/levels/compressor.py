"""What every compressor is: from one weight matrix and the statistics of its inputs to all of its levels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from evo_hpo.levels.factor import Factor, factorise
from evo_hpo.levels.packing import Encoded

Needs = Literal["nothing", "diagonal", "hessian"]


@dataclass(frozen=True)
class CompressedLevel:
    """One level of one layer.

    Attributes:
        label: name of the level, such as "3" (bits) or "0.5" (sparsity).
        encoded: the weights.
        bits: nominal bits of the whole layer (bits a weight x weights; 16 for each kept weight of a sparse layer).
        weights: number of weights kept.
        error: relative squared error, lower is better; of the output on calibration tokens where H is known, of the
            output as if inputs were uncorrelated where only the diagonal is, of the weights otherwise.
    """

    label: str
    encoded: Encoded
    bits: int
    weights: int
    error: float


class Inputs:
    """Statistics of one layer's inputs; the factorisation is made on first use, shared by layers with equal inputs.

    Args:
        sums: H, or its diagonal; None where nothing is known.
        device: of what stands in for unknown sums.
    """

    def __init__(
        self,
        sums: torch.Tensor | None,
        columns: int,
        damping: float = 0.01,
        activation_order: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._sums = sums
        self._columns = columns
        self._device = device
        self._damping = damping
        self._activation_order = activation_order
        self._factor: Factor | None = None

    @property
    def diagonal(self) -> torch.Tensor:
        """Sum of x^2 for each input; ones where nothing is known."""
        if self._sums is None:
            return torch.ones(self._columns, device=self._device)
        return self._sums if self._sums.dim() == 1 else self._sums.diagonal()

    @property
    def correlated(self) -> bool:
        """Whether H is known, not its diagonal alone."""
        return self._sums is not None and self._sums.dim() == 2

    @property
    def factor(self) -> Factor:
        """Factor of H; of the identity where nothing is known (then every correction vanishes)."""
        if self._factor is None:
            hessian = torch.eye(self._columns, device=self._device) if self._sums is None else self._sums
            self._factor = factorise(hessian, self._damping, self._activation_order)
        return self._factor


class Compressor(ABC):
    """A method with its settings."""

    name: ClassVar[str]
    needs: Needs
    resource: ClassVar[str] = "bits"  # what a budget counts by default
    damping: float = 0.01
    activation_order: bool = False
    embedding: bool = False  # whether the token embedding and the output head get levels too

    @property
    @abstractmethod
    def labels(self) -> tuple[str, ...]:
        """Labels of the levels, from most to least compressed."""

    @property
    def everywhere(self) -> tuple[str, ...]:
        """Labels of levels that every layer is offered, whatever its shape."""
        return self.labels

    def offered(self, rows: int, columns: int) -> tuple[str, ...]:
        """Labels of the levels of a layer of this shape (outputs, inputs), in the order of `labels`."""
        return self.labels

    def unfit(self, rows: int, columns: int) -> str:
        """What keeps levels from a layer of this shape, where it is not offered all."""
        raise NotImplementedError

    @abstractmethod
    def compress(self, weight: torch.Tensor, inputs: Inputs) -> list[CompressedLevel]:
        """All levels that a layer is offered, in the order of `labels`; weight is rows (outputs) x columns (inputs)."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, JSON-ready."""
