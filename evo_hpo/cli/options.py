"""What commands share: the consoles they write to, options that several take, settings as they are typed."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from evo_hpo.cli.streams import LastingConsole
from evo_hpo.errors import PlanError

console = LastingConsole(width=None if sys.stdout and sys.stdout.isatty() else 150)  # files and pipes get whole tables
errors = LastingConsole(stderr=True)

RootOption = Annotated[Path, typer.Option(help="Folder that holds the comparisons.")]
UriOption = Annotated[
    str | None, typer.Option(help="MLflow tracking URI; default: $MLFLOW_TRACKING_URI, or sqlite in mlruns.")
]
TrackOption = Annotated[bool, typer.Option(help="Write every trial to MLflow while searching.")]
WorkersOption = Annotated[int | None, typer.Option(help="Processes; changes no result. Default: the plan's.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting; repeatable.")]
RayOption = Annotated[str | None, typer.Option(metavar="ADDRESS", help="Score on Ray: host:port, auto or local.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Only check, and say what it would take: tokens, hours, memory.")
]
DEFAULT_ROOT = Path("mlruns") / "comparisons"


def parse_settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    """``key=value`` pairs as a dict; values are read as TOML (3, 2.5, true, [1, 2], "text"), or else as text.

    Raises:
        PlanError: a pair without an equals sign.
    """
    settings: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise PlanError(f"setting {pair!r} must be KEY=VALUE, for example offspring=32")
        try:
            settings[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            settings[key] = value
    return settings
