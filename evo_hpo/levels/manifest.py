"""What a level store says about itself: the plan of its build, and one record for each unit and level."""

from __future__ import annotations

import json
import platform
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evo_hpo.errors import StoreError
from evo_hpo.files import write_whole
from evo_hpo.levels.masks import parse_sparsities
from evo_hpo.models.identity import differences

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
class Recipe:
    """Everything that decides what a build writes; a build may only go on in a folder with the same plan.

    Names say nothing about content: `model` and the calibration's `text` may differ where `identity` and `tokens`,
    hashes of what they stand for, are equal. Plans of earlier versions have no identity.
    """

    model: str
    identity: dict[str, str]
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
    def from_json(cls, data: dict[str, Any]) -> Recipe:
        """Rebuild a plan from `to_json`, of this version or an earlier one."""
        known = {k: v for k, v in data.items() if k != "model_fingerprint"}
        return cls(**{"identity": {}, **known, "units": tuple(data["units"])})

    def differences(self, wanted: Recipe) -> str:
        """What decides about the files and is not equal in the plan that is wanted, in words; empty: the same store."""
        words = [differences(self.identity, wanted.identity)]
        named = {"tokens": "calibration text", "dtype": "dtype"}
        skipped = {"text"} if self.identity else {"tokens"}  # earlier versions know texts by their names
        skipped |= set() if self.calibration else {"dtype"}  # and of methods without data no dtype
        for key in dict.fromkeys([*self.calibration, *wanted.calibration]):
            if key not in skipped and self.calibration.get(key) != wanted.calibration.get(key):
                words.append(named.get(key, f"calibration {key}"))
        words += ["settings"] * (_alike(self.settings) != _alike(wanted.settings))
        fields = ("method", "units", "resource", "format")
        return ", ".join(filter(None, [*words, *(k for k in fields if getattr(self, k) != getattr(wanted, k))]))


def _alike(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with sparsities in one order and spelling: earlier versions recorded them as they were given."""
    if "sparsities" not in settings:
        return dict(settings)
    return {**settings, "sparsities": sorted(level.label for level in parse_sparsities(settings["sparsities"]))}


@dataclass(frozen=True)
class Manifest:
    """The plan, the records, and the versions that wrote them."""

    plan: Recipe
    units: tuple[UnitRecord, ...]
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write `manifest.json`; its presence says that the store is complete."""
        data = {"plan": self.plan.to_json(), "versions": self.versions, "units": [asdict(u) for u in self.units]}
        write_whole(folder / "manifest.json", json.dumps(data, indent=1))

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
        return cls.of(path.read_bytes(), repr(str(path)))

    @classmethod
    def of(cls, text: bytes, where: str) -> Manifest:
        """The manifest with this text; errors, as those of :meth:`read`, say ``where`` it is from."""
        try:
            data = json.loads(text)
            if data["plan"]["format"] != FORMAT:
                raise StoreError(f"{where} has format {data['plan']['format']}, this version reads {FORMAT}: rebuild")
            units = tuple(UnitRecord.from_json(unit) for unit in data["units"])
            return cls(Recipe.from_json(data["plan"]), units, data["versions"])
        except StoreError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise StoreError(f"damaged manifest {where} ({error}): rebuild the store") from error


def versions() -> dict[str, str]:
    """Versions of what takes part in a build."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def missing_bytes(folder: Path, record: UnitRecord) -> str:
    """What is wrong with the size of a unit's file, in words; empty: nothing."""
    path = folder / record.file
    if not record.file or (path.is_file() and path.stat().st_size == record.bytes):
        return ""
    found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
    return f"{record.file!r} in {str(folder)!r} is {found}, not {record.bytes} bytes"


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
