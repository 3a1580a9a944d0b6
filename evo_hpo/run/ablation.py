"""Ablations: one base searcher, and which of its settings to vary, as ordinary entries of a comparison."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

from evo_hpo.errors import PlanError

if TYPE_CHECKING:
    from evo_hpo.run.plan import AblationEntry, Plan, SearcherEntry

__all__ = ["expand"]


def expand(plan: Plan) -> Plan:
    """The plan with its ablation written out: one searcher a variant, beside those that the plan names anyway.

    One setting at a time by default; ``grid`` takes every combination. The base itself is always there.

    Raises:
        PlanError: nothing to vary, or two variants of one label.
    """
    ablation = plan.ablation
    if ablation is None:
        return plan
    base = next((s for s in plan.searchers if s.key == ablation.searcher), None)
    if base is None:
        raise PlanError(
            f"ablation: searcher {ablation.searcher!r} is not in the plan; it has: "
            f"{', '.join(s.key for s in plan.searchers)}"
        )
    variants = _variants(ablation)
    if not variants:
        raise PlanError("ablation: nothing to vary: give [ablation.vary] or [[ablation.variants]]")
    entries = list(plan.searchers)
    taken = {s.key for s in entries}
    for label, settings in variants:
        if all(base.settings.get(k) == v for k, v in settings.items()):
            continue  # the base itself
        entry = _variant(base, label, settings)
        if entry.key in taken:
            raise PlanError(f"ablation: two variants are called {entry.key!r}: give them labels")
        taken.add(entry.key)
        entries.append(entry)
    return plan.model_copy(update={"searchers": tuple(entries), "ablation": None})


def _variant(base: SearcherEntry, label: str, settings: dict[str, Any]) -> SearcherEntry:
    return base.model_copy(update={"label": f"{base.key} {label}", "settings": {**base.settings, **settings}})


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
