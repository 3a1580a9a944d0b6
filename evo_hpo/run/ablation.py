"""Ablations: one base searcher, and which of its settings to vary, as ordinary entries of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from evo_hpo.errors import PlanError
from evo_hpo.run.entries import AblationEntry, SearcherEntry

__all__ = ["expand"]


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
    found: list[tuple[str, dict[str, Any]]] = []
    if ablation.grid:
        for values in product(*ablation.vary.values()):
            settings = dict(zip(ablation.vary, values, strict=True))
            found.append((", ".join(f"{k}={_shown(v)}" for k, v in settings.items()), settings))
    else:
        for key, values in ablation.vary.items():
            found += [(f"{key}={_shown(value)}", {key: value}) for value in values]
    for variant in ablation.variants:
        shown = ", ".join(f"{k}={_shown(v)}" for k, v in variant.settings.items())
        found.append((variant.label or shown, variant.settings))
    return found


def _shown(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
