"""Plans from the command line, written as TOML, so that a comparison's folder always says how to repeat it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["search_text", "varied_text"]


def _value(value: object) -> str:
    """A TOML value; for what settings are made of: numbers, strings, booleans, lists, tables."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def search_text(data: Mapping[str, Any]) -> str:
    """A plan of plain data: top-level values, a table, or arrays of tables."""
    lines = [f"{_key(k)} = {_value(v)}" for k, v in data.items() if k not in ("budget", "problems", "searchers")]
    lines += ["", "[budget]", *(f"{_key(k)} = {_value(v)}" for k, v in data["budget"].items())]
    for part in ("problems", "searchers"):
        for entry in data[part]:
            lines += ["", f"[[{part}]]", *(f"{_key(k)} = {_value(v)}" for k, v in entry.items())]
    return "\n".join(lines) + "\n"


def varied_text(text: str, name: str, ablation: Mapping[str, Any]) -> str:
    """A plan's text with another name, and with what ``--vary`` adds in place of an ablation of its own."""
    head, tables = re.split(r"(?m)^(?=\s*\[)", text, maxsplit=1) if re.search(r"(?m)^\s*\[", text) else (text, "")
    head = re.sub(r"(?m)^name\s*=.*$", lambda _: f"name = {_value(name)}", head, count=1)
    kept = [part for part in re.split(r"(?m)^(?=\s*\[)", tables) if not re.match(r"\s*\[+ablation\b", part)]
    added = ["", "[ablation]", *(f"{_key(k)} = {_value(v)}" for k, v in ablation.items())]
    return (head + "".join(kept)).rstrip("\n") + "\n" + "\n".join(added) + "\n"
