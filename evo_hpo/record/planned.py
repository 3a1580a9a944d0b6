"""The searches of a comparison as they were planned, in records of this version and of older ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class PlannedSearch:
    """One search of a comparison.

    Attributes:
        id: its name in the comparison, unique.
        problem: key of the problem.
        searcher: registered name; ``label``: shown name, which tells variants apart.
        seed: of searcher and minibatches.
        journal: its journal, relative to the folder.
        deterministic: the searcher ignores its seed, so that this search stands for every seed.
    """

    id: str
    problem: str
    searcher: str
    label: str
    settings: Mapping[str, Any]
    seed: int
    journal: str
    deterministic: bool


def planned(entries: Sequence[Mapping[str, Any]]) -> tuple[PlannedSearch, ...]:
    """Searches as recorded; old records do not say whether a searcher is deterministic.

    There, one that was planned for a single seed where others have several is taken for it.
    """
    labels = disambiguate(entries)
    pairs = [(str(e["problem"]), label) for e, label in zip(entries, labels, strict=True)]
    seeds = Counter(pairs)
    most = {problem: max(n for (p, _), n in seeds.items() if p == problem) for problem, _ in seeds}
    names = {f.name for f in fields(PlannedSearch)}
    found = []
    for entry, (problem, label) in zip(entries, pairs, strict=True):
        known: dict[str, Any] = {"settings": {}, "deterministic": seeds[problem, label] == 1 < most[problem]}
        known |= {k: v for k, v in entry.items() if k in names}
        found.append(PlannedSearch(**(known | {"label": label})))
    return tuple(found)


def distinct(names: Mapping[str, str]) -> dict[str, str]:
    """Key -> its name, in which no two are alike: of those that share one the first keeps it, others get a number."""
    found: dict[str, str] = {}
    for key, name in names.items():
        own, number = name, 2
        while own in found.values() or (own != name and own in names.values()):
            own, number = f"{name}-{number}", number + 1
        found[key] = own
    return found


def disambiguate(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each search entry; variants that share a label get their differing settings added to it."""
    variants: dict[str, list[str]] = {}
    for entry in entries:
        key = json.dumps([entry.get("searcher"), entry.get("settings") or {}], sort_keys=True, default=str)
        known = variants.setdefault(str(entry.get("label") or entry.get("searcher")), [])
        if key not in known:
            known.append(key)
    labels = []
    for entry in entries:
        label = str(entry.get("label") or entry.get("searcher"))
        if len(variants[label]) > 1:
            all_settings = [json.loads(k)[1] for k in variants[label]]
            own = json.loads(json.dumps(entry.get("settings") or {}, default=str))
            differing = [k for k in own if any(s.get(k) != own[k] for s in all_settings)]
            label += " (" + (", ".join(f"{k}={own[k]}" for k in differing) or "default settings") + ")"
        labels.append(label)
    return labels
