"""A plan as a TOML file: its text, which a comparison's folder keeps, and the plan in it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from evo_hpo.errors import PlanError
from evo_hpo.run.plan import Plan, make_plan


@dataclass(frozen=True)
class PlanFile:
    """The text of a plan, valid TOML; ``source`` is where it is from, for messages."""

    text: str
    source: str = "plan"

    @classmethod
    def read(cls, path: str | Path) -> PlanFile:
        """The file at a path, read once.

        Raises:
            PlanError: no such file, or malformed TOML, in one line.
        """
        path = Path(path)
        try:
            file = cls(path.read_text(encoding="utf-8-sig"), str(path))
            tomllib.loads(file.text)
        except FileNotFoundError:
            raise PlanError(f"no plan at {path}: copy one from benchmarks/plans") from None
        except IsADirectoryError:
            raise PlanError(f"{path} is a folder: give the plan's TOML file") from None
        except OSError as error:
            raise PlanError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:  # TOML or UTF-8 that is none; too many digits; nested too deep
            raise PlanError(f"{path} is not valid TOML: {error}") from None
        return file

    @classmethod
    def of(cls, data: Mapping[str, Any], source: str) -> PlanFile:
        """A plan of plain data, for example from the command line, written as TOML."""
        return cls(tomlkit.dumps(data), source)

    @property
    def data(self) -> dict[str, Any]:
        """What the text says, as plain data."""
        return tomllib.loads(self.text)

    def plan(self, **changes: Any) -> Plan:
        """The plan; ``changes`` replace top-level keys.

        Raises:
            PlanError: unknown keys or values out of range, in one line.
        """
        return make_plan(self.data | changes, self.source)

    def varied(self, name: str, ablation: Mapping[str, Any]) -> PlanFile:
        """The plan under another name with another ablation, or one where it had none; all else stays, comments too."""
        document = tomlkit.parse(self.text)
        document["name"] = name
        document.pop("ablation", None)
        document.append("ablation", tomlkit.item(dict(ablation)))
        return PlanFile(tomlkit.dumps(document), self.source)
