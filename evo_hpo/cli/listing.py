"""``evo-hpo list``: names of searchers and problems, and the settings of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evo_hpo.errors import EvoHpoError
from evo_hpo.search import registry


def show_settings(name: str, console: Console) -> None:
    """Settings of a searcher or problem with defaults and meanings; of a family, its members."""
    members = [m for m in registry.available_searchers() if m.startswith(f"{name}:")]
    if members:
        console.print("  ".join(members), highlight=False)
        return
    known_problem, searchers = name in registry.available_problems(), registry.available_searchers()
    if not known_problem and name not in searchers and ":" not in name:
        raise registry.unknown("searcher or problem", name, (*searchers, *registry.available_problems()))
    described = registry.describe_problem(name) if known_problem else registry.describe_searcher(name)
    console.print(f"[bold]{described.name}[/bold]: {escape(described.summary)}")
    table = Table("setting", "default", "what it does")
    for key, value in described.settings.items():
        default = "required" if value is inspect.Parameter.empty else repr(value)
        table.add_row(key, escape(default), escape(described.meanings.get(key, "")))
    console.print(table)


def show_names(console: Console) -> None:
    """All searchers and problems with their summaries; members of a family in one row."""
    for title, names, describe in (
        ("searcher", registry.available_searchers(), registry.describe_searcher),
        ("problem", registry.available_problems(), registry.describe_problem),
    ):
        table = Table(title, "what it is")
        families: dict[str, list[str]] = {}
        for entry in names:
            prefix, colon, member = entry.partition(":")
            if colon:
                families.setdefault(prefix, []).append(member)
            else:
                table.add_row(entry, _summary(describe, entry))
        for prefix, members in families.items():
            shown = ", ".join(members) if len(members) <= 12 else f"{len(members)}; all: evo-hpo list {prefix}"
            table.add_row(f"{prefix}:<name>", shown)
        console.print(table)


def _summary(describe: Callable[[str], Any], name: str) -> str:
    try:
        return str(describe(name).summary)
    except EvoHpoError as error:
        return str(error)
