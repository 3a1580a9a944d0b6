"""Where a model and its levels are: on one device, on several of a machine, or brought to it block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.store import Memory
from evo_hpo.models.loading import LoadedModel, load_model
from evo_hpo.models.mixed import MIXED, mix, model_dtype
from evo_hpo.models.placing import Stages, beside_blocks
from evo_hpo.models.structure import decoder_blocks

KINDS: tuple[Memory, ...] = ("resident", "packed", "streamed")
"""How a task's levels are held."""


@dataclass(frozen=True)
class Placement:
    """One of three ways.

    Attributes:
        device: of everything, or with ``devices`` of nothing.
        devices: that the decoder blocks are spread over; the first has the rest of the model too.
        memory: of :data:`KINDS`; "streamed": blocks and levels wait in main memory.

    Raises:
        InvalidSettingError: devices that torch does not know or that are given twice over, or a combination that means
            nothing.
    """

    device: str
    devices: tuple[str, ...]
    memory: str

    def __post_init__(self) -> None:
        if self.memory not in KINDS:
            raise InvalidSettingError(f"memory={self.memory!r} must be one of: {', '.join(map(str, KINDS))}")
        for name in (self.device, *self.devices):
            try:
                torch.device(name)
            except (RuntimeError, TypeError):
                raise InvalidSettingError(
                    f"device {name!r} is none that torch knows: use cpu, cuda, cuda:0 and so on, or device = 'auto'"
                ) from None
        if self.devices and self.memory == "streamed":
            raise InvalidSettingError(
                f"devices={list(self.devices)} spread a model that stays there: use memory = 'packed' or 'resident'"
            )
        if self.devices and self.device not in ("cpu", self.devices[0]):
            raise InvalidSettingError(f"device={self.device!r} and devices={list(self.devices)}: give one of them")

    @property
    def main(self) -> str:
        """The device of embeddings, head, text and sums."""
        return self.devices[0] if self.devices else self.device

    @property
    def streamed(self) -> bool:
        """Whether blocks are brought to the device."""
        return self.memory == "streamed"

    def load(self, model: str, dtype: str) -> LoadedModel:
        """The model, on its device where it has one, else in main memory until :meth:`place`.

        Args:
            dtype: its name, or ``mixed``.

        Raises:
            ModelError: as :func:`load_model`; another dtype; or a model that cannot be mixed.
        """
        where = "cpu" if self.devices or self.streamed else self.device
        if dtype != MIXED:
            return load_model(model, model_dtype(dtype), where)
        loaded = load_model(model, model_dtype(dtype))
        mix(loaded.model)  # before it is moved: a device need not hold it in float32
        loaded.model.to(where)
        return loaded

    def place(self, loaded: LoadedModel) -> str | Callable[[str], str]:
        """Moves what must be moved; the device of a module's levels by its name, or of all."""
        if self.devices:
            return Stages.spread(loaded.model, self.devices)
        if self.streamed:
            beside_blocks(loaded.model, self.device)
            if torch.device(self.device).type == "cuda":
                for block in decoder_blocks(loaded.model).values():
                    for parameter in block.parameters():
                        parameter.data = parameter.data.pin_memory()
        return self.device
