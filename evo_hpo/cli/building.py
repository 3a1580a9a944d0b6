"""``evo-hpo build``: a level store, and what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from evo_hpo.cli.progress import BuildProgress
from evo_hpo.cli.unexpected import safe
from evo_hpo.levels.build import build, default_folder, summary


def build_from_cli(
    console: Console,
    *,
    model: str,
    method: str = "gptq",
    output: Path | None = None,
    levels: str | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Build a store and print what it holds: nominal and stored bits a weight, and the error of each level."""
    values = [v.strip() for v in levels.split(",")] if levels else None
    chosen = settings or {}
    folder = output or default_folder(model, method, values, chosen)
    kept = f"the units that were built are kept in {folder}, and the same command goes on from there"
    with safe(kept, KeyboardInterrupt), BuildProgress("build", console) as progress:
        store = build(model, folder, method=method, levels=values, progress=progress, **chosen)
    console.print(f"{folder}: {len(store.units)} units, fingerprint {store.fingerprint}", soft_wrap=True)
    table = Table()
    for column in ("level", "nominal bits a weight", "stored bits a weight", "weights kept", "mean error"):
        table.add_column(column, justify="right")
    for row in summary(store):
        table.add_row(*row)
    console.print(table)
