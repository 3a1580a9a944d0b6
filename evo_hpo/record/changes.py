"""What changed between two descriptions of plain data, and how to say it in a line."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

_log = logging.getLogger("evo_hpo")


def flat(value: Any, prefix: str = "", joint: str = "/") -> dict[str, Any]:
    """Nested mappings as one: ``prefix/key/key`` -> value; an empty mapping counts as a value."""
    if isinstance(value, Mapping) and value:
        inner = ((f"{prefix}{joint}{key}" if prefix else str(key), v) for key, v in value.items())
        return {k: v for name, held in inner for k, v in flat(held, name, joint).items()}
    return {prefix: value}


def changes(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Key -> (old, new) where they are not equal; a key that one of them lacks is ``"absent"`` there."""
    keys = [k for k in {**old, **new} if k not in ignore]
    pairs = {k: (old.get(k, "absent"), new.get(k, "absent")) for k in keys}
    return {k: (before, now) for k, (before, now) in pairs.items() if before != now}


def comparable(old: Mapping[str, Any], new: Mapping[str, Any], where: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two fingerprints as flat mappings that can be compared.

    One of an earlier version says nothing about content (it has no ``identity``): only what both name is compared, and
    a warning says so.
    """
    if "identity" in new and "identity" not in old:
        _log.warning("%s is of an earlier version and does not say what it was made from: not checked", where)
        old, new = ({k: v for k, v in each.items() if k in old and k in new} for each in (old, new))
    return flat(old, joint="."), flat(new, joint=".")


def told(found: Mapping[str, tuple[Any, Any]], most: int = 6) -> str:
    """Changes in one line, the first ``most`` of them."""
    parts = [f"{key}: {_change(old, new)}" for key, (old, new) in list(found.items())[:most]]
    return "; ".join([*parts, *([f"and {len(found) - most} more"] if len(found) > most else [])])


def _change(old: object, new: object) -> str:
    if isinstance(old, list) and isinstance(new, list):
        gone, added = [x for x in old if x not in new], [x for x in new if x not in old]
        parts = [f"{verb} {_short(entries)}" for verb, entries in (("had", gone), ("now has", added)) if entries]
        return ", ".join(parts) or "has another order"
    return f"was {_short(old)}, is {_short(new)}"


def _short(value: object) -> str:
    text = "absent" if value == "absent" else repr(value)
    return text if len(text) <= 120 else f"{text[:90]}... ({len(text)} characters)"
