"""What a level store says about itself: the plan of its build, and one record for each unit and level."""

from __future__ import annotations

import json
import os
import platform
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evo_hpo.errors import StoreError

__all__ = ["FORMAT", "LevelRecord", "Manifest", "Plan", "UnitRecord", "checksum", "write_atomically"]

FORMAT = 1


@dataclass(frozen=True)
class LevelRecord:
    """One level of one unit.

    Attributes:
        label: "3" (bits), "0.5" (sparsity), "dropped", "kept".
        bits: nominal bits of the unit at this level; weights: how many are kept; modules: 1, or 0 where dropped.
        storage: bits on disk, scales, zero points and masks included.
        error: layer-wise relative squared error, lower is better.
        settings: how to decode the level's tensors.
    """

    label: str
    bits: int
    weights: int
    modules: int
    storage: int
    error: float
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UnitRecord:
    """One unit of the store; levels in ascending order of nominal cost."""

    name: str
    members: tuple[str, ...]
    shape: tuple[int, ...]
    size: int
    transposed: bool
    levels: tuple[LevelRecord, ...]
    file: str = ""
    bytes: int = 0
    crc32: int = 0

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> UnitRecord:
        """Rebuild a record from `dataclasses.asdict` of it."""
        levels = tuple(LevelRecord(**level) for level in data["levels"])
        return cls(**{**data, "members": tuple(data["members"]), "shape": tuple(data["shape"]), "levels": levels})


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a build writes; a build may only go on in a folder with the same plan."""

    model: str
    model_fingerprint: str
    method: str
    settings: dict[str, Any]
    calibration: dict[str, Any]
    units: tuple[str, ...]
    resource: str
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Rebuild a plan from `to_json`."""
        return cls(**{**data, "units": tuple(data["units"])})


@dataclass(frozen=True)
class Manifest:
    """The plan, the records, and the versions that wrote them."""

    plan: Plan
    units: tuple[UnitRecord, ...]
    versions: dict[str, str]

    @property
    def model_fingerprint(self) -> str:
        """Fingerprint of the model that was compressed."""
        return self.plan.model_fingerprint

    @property
    def fingerprint(self) -> str:
        """Identifies the plan and every file of the store."""
        return f"{zlib.crc32(self._text().encode()):08x}"

    def _text(self) -> str:
        units = [{k: v for k, v in asdict(u).items() if k != "levels"} for u in self.units]
        return json.dumps([self.plan.to_json(), units], sort_keys=True)

    def write(self, folder: Path) -> None:
        """Write `manifest.json`; its presence says that the store is complete."""
        data = {"plan": self.plan.to_json(), "versions": self.versions, "units": [asdict(u) for u in self.units]}
        write_atomically(folder / "manifest.json", json.dumps(data, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a complete store.

        Raises:
            StoreError: there is none, or it cannot be understood.
        """
        path = folder / "manifest.json"
        if not path.is_file():
            begun = (folder / "build.json").is_file()
            raise StoreError(
                f"no level store at {str(folder)!r}: "
                + ("its build was not finished, run the same build again" if begun else "build one first")
            )
        try:
            data = json.loads(path.read_text())
            if data["plan"]["format"] != FORMAT:
                raise StoreError(
                    f"{str(path)!r} has format {data['plan']['format']}, this version reads {FORMAT}: rebuild"
                )
            units = tuple(UnitRecord.from_json(unit) for unit in data["units"])
            return cls(Plan.from_json(data["plan"]), units, data["versions"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise StoreError(f"damaged manifest {str(path)!r} ({error}): rebuild the store") from error


def versions() -> dict[str, str]:
    """Versions of what takes part in a build."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either absent or complete, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
