"""Searchers under several settings, written out as ordinary entries of a comparison: ``each``, and ablations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from evo_hpo.errors import PlanError
from evo_hpo.run.entries import AblationEntry, SearcherEntry

MOST_VARIANTS = 1000
"""Combinations of one entry's values."""


def written_out(searchers: Sequence[SearcherEntry]) -> tuple[SearcherEntry, ...]:
    """The searchers, those with ``each`` as one entry for every combination of its values."""
    found = []
    for entry in searchers:
        for label, settings in _combinations(entry.each) if entry.each else [("", {})]:
            more = {"label": f"{entry.key} {label}", "settings": {**entry.settings, **settings}, "each": None}
            found.append(entry.model_copy(update=more) if label else entry)
    return tuple(found)


def expand(searchers: Sequence[SearcherEntry], ablation: AblationEntry) -> tuple[SearcherEntry, ...]:
    """A plan's searchers with its ablation written out: one a variant, beside those that are named anyway.

    One setting at a time by default; ``grid`` takes every combination. The base itself is always there.

    Raises:
        PlanError: nothing to vary, or two variants of one label.
    """
    base = next((s for s in searchers if s.key == ablation.searcher), None)
    if base is None:
        known = ", ".join(s.key for s in searchers)
        raise PlanError(f"ablation: searcher {ablation.searcher!r} is not in the plan; it has: {known}")
    variants = _variants(ablation)
    if not variants:
        raise PlanError("ablation: nothing to vary: give [ablation.vary] or [[ablation.variants]]")
    entries = {s.key: s for s in searchers}
    for label, settings in variants:
        if all(base.settings.get(k) == v for k, v in settings.items()):
            continue  # the base itself
        key = f"{base.key} {label}"
        if key in entries:
            raise PlanError(f"ablation: two variants are called {key!r}: give them labels")
        entries[key] = base.model_copy(update={"label": key, "settings": {**base.settings, **settings}})
    return tuple(entries.values())


def _variants(ablation: AblationEntry) -> list[tuple[str, dict[str, Any]]]:
    grids = [ablation.vary] if ablation.grid and ablation.vary else [{k: v} for k, v in ablation.vary.items()]
    found = [variant for grid in grids for variant in _combinations(grid)]
    return found + [(variant.label or _shown(variant.settings), variant.settings) for variant in ablation.variants]


def _combinations(vary: Mapping[str, Sequence[Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Every combination of the values, with a label that names them.

    Raises:
        PlanError: a setting has no values, or they are more combinations than anybody runs.
    """
    for name, values in vary.items():
        if not values:
            raise PlanError(f"{name}=[] gives no values: give at least one, or leave it out")
    if (count := math.prod(map(len, vary.values()))) > MOST_VARIANTS:
        raise PlanError(f"{count} combinations of {', '.join(vary)}: give at most {MOST_VARIANTS}")
    found = [dict(zip(vary, values, strict=True)) for values in product(*vary.values())]
    return [(_shown(settings), settings) for settings in found]


def _shown(settings: Mapping[str, Any]) -> str:
    texts = {k: "/".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for k, v in settings.items()}
    return ", ".join(f"{k}={v}" for k, v in texts.items())
