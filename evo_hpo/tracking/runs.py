"""What a journal becomes in a store of runs: a parent run a search with curves, a child run a trial. Plain values."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evo_hpo.record.changes import flat
from evo_hpo.record.lines import decode_checkpoint, decode_levels, decode_outcome, encode_levels
from evo_hpo.search.checkpoint import FrontPoint, losses_by_text
from evo_hpo.search.trial import Outcome
from evo_hpo.space.compression_space import CompressionSpace

UNITS_SHOWN = 40
"""Spaces of at most this many units have a parameter for each unit on every trial; larger ones only ``levels``."""

LONGEST_PARAM = 6000
LONGEST_TAG = 8000
LONGEST_NAME = 250


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a curve; ``when`` in milliseconds since the epoch."""

    key: str
    value: float
    when: int
    step: int


@dataclass(frozen=True, slots=True)
class ChildRun:
    """One trial as a run; times in milliseconds since the epoch."""

    trial: int
    name: str
    status: str
    start: int
    end: int
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]


def safe_key(name: str) -> str:
    """``name`` as a key that MLflow takes; changed names end in a hash, so that two never become one."""
    plain = re.fullmatch(r"[\w. /-]{1,200}", name, re.ASCII) and not re.search(r"^[./]|[./]$|//|\./|\.\.", name)
    if plain:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return re.sub(r"[^\w-]+", "_", name, flags=re.ASCII).strip("_")[:180] + f"-{digest}"


def shown(value: Any, limit: int, where: str) -> str:
    """``value`` as text of at most ``limit`` characters; a longer one says so and where it is whole."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text.encode("utf-8", "replace").decode().replace("\0", "?")
    if len(text) <= limit:
        return text
    note = f"... ({len(text)} characters, whole in {where})"
    return text[: limit - len(note)] + note


def milliseconds(seconds: Any) -> int:
    """Seconds since the epoch as MLflow counts time."""
    return 0 if seconds is None else int(float(seconds) * 1000)


class SearchRuns:
    """Turns the lines of one search's journal, in order, into runs; holds what running curves need.

    Args:
        header: the journal's header.

    Attributes:
        name: of the parent run, ``evopress s0`` for the search ``evopress-s0``; children add ``t0042``.
        key: identifies the search in a store, whatever else has the same name.
    """

    def __init__(self, header: Mapping[str, Any]) -> None:
        self.header = header
        self.search = str(header["search"])
        self.key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:24]
        self.name = shown(re.sub(r"-s(\d+)$", r" s\1", self.search), LONGEST_NAME, "header.json")
        described = header.get("space")
        self.space = None if described is None else CompressionSpace.from_json(described)
        self.unit_keys = [safe_key(f"unit/{u.name}") for u in self.space.units] if self.space else []
        self.state: tuple[int, int, tuple[int, float] | None] = (0, 0, None)

    # ------------------------------------------------------------------ parent

    @property
    def start(self) -> int:
        """When the search was created."""
        return milliseconds(self.header.get("created"))

    def tags(self) -> dict[str, str]:
        """Tags of the parent run."""
        header = self.header
        tags = {
            "kind": "search",
            "search": self.search,
            "searcher": str(header.get("searcher", "")),
            "label": str(header.get("label") or header.get("searcher", "")),
            "seed": str(header.get("seed", "")),
            "problem": str(header.get("problem", "")),
        }
        commit = (header.get("git") or {}).get("commit")
        if commit:
            tags["mlflow.source.git.commit"] = commit
        return {k: shown(v, LONGEST_TAG, "header.json") for k, v in tags.items()}

    def params(self) -> dict[str, str]:
        """Searcher, problem, budget and settings, flattened; ``header.json`` holds everything whole."""
        header = self.header
        values = {
            **{k: header.get(k) for k in ("searcher", "label", "seed", "problem", "minibatch_seed")},
            "units": len(self.unit_keys) or None,
            **flat(header.get("budget") or {}, "budget"),
            **flat(header.get("settings") or {}, "settings"),
            **flat(header.get("fingerprint") or {}, "fingerprint"),
            **flat(header.get("versions") or {}, "versions"),
        }
        given = {k: v for k, v in values.items() if v not in (None, {})}
        return {safe_key(k): shown(v, LONGEST_PARAM, "header.json") for k, v in given.items()}

    def checkpoint(self, line: Mapping[str, Any]) -> list[Point]:
        """Held-out figures; steps are tokens spent (trials where the problem reads none). With the last, the front."""
        point = decode_checkpoint(line)
        step, when = point.tokens or point.evaluations, milliseconds(line["time"])
        figures = {safe_key(f"held_out/{k}"): v for k, v in point.held_out.items()}
        if self.space is not None:
            figures["held_out/average"] = self.space.average(point.levels)
        front = self._front(point.front, when) if point.fraction == 1 else []
        return [Point(k, v, when, step) for k, v in figures.items()] + front

    def _front(self, points: Sequence[FrontPoint], when: int) -> list[Point]:
        """Held-out losses along a front; steps are its costs: kB, or thousandths of the average."""
        space, found = self.space, dict[tuple[str, int], float]()
        if space is None:
            return []
        for point in points:
            step = round(point.cost / 1000 if space.resources[0] == "bytes" else 1000 * space.average(point.levels))
            losses = ((k, v) for k, v in losses_by_text(point.held_out).items() if math.isfinite(v))
            found |= {(safe_key("/".join(filter(None, ("front", k, "loss")))), step): v for k, v in losses}
        return [Point(key, value, when, step) for (key, step), value in found.items()]

    def end(self, line: Mapping[str, Any]) -> tuple[list[Point], dict[str, str], dict[str, str]]:
        """Final figures, parameters (the recommended levels) and tags of the parent run."""
        figures = {k: float(line[k]) for k in ("seconds", "searcher_seconds")} | {"trials": float(self.state[0])}
        if line["best"] is not None and math.isfinite(float(line["best_loss"])):
            figures["loss"] = float(line["best_loss"])
        when = milliseconds(line["time"])
        params: dict[str, str] = {}
        if line["best"] is not None:
            params = {"best_levels": shown(line["best"], LONGEST_PARAM, "the journal")}
            params |= self.units(decode_levels(line["best"]))
        tags = {"stop_reason": shown(line["stop_reason"], LONGEST_TAG, "the journal")}
        return [Point(f"final/{k}", v, when, 0) for k, v in figures.items()], params, tags

    # ------------------------------------------------------------------ trials

    def take(self, line: Mapping[str, Any]) -> tuple[Outcome, list[Point]]:
        """Adds a trial to the running state; the points it adds to the parent's curves (steps count trials).

        ``search/best_loss`` is the least loss at the largest fidelity so far: it may rise when the fidelity does.
        """
        outcome = decode_outcome(line)
        step, tokens, best = self.state
        tokens += outcome.tokens
        rank = (-outcome.tokens, outcome.loss)
        if outcome.usable and (best is None or rank < best):
            best = rank
        self.state = step + 1, tokens, best
        points = {"search/tokens": float(tokens)}
        if outcome.usable:
            points["search/trial_loss"] = outcome.loss
        if best is not None:
            points["search/best_loss"] = best[1]
        if self.space is not None:
            points["search/average"] = self.space.average(outcome.trial.levels)
        when = milliseconds(line["time"])
        return outcome, [Point(key, value, when, step) for key, value in points.items()]

    def take_probe(self, line: Mapping[str, Any]) -> None:
        """Adds the tokens that sensitivities were charged to those of the next trial's point."""
        step, tokens, best = self.state
        self.state = step, tokens + int(line["sensitivities"]["tokens"]), best

    def child(self, outcome: Outcome, when: int) -> ChildRun:
        """A trial as a run."""
        trial = outcome.trial
        metrics = {"tokens": float(outcome.tokens)}
        if outcome.status != "failed" and math.isfinite(outcome.loss):
            metrics["loss" if outcome.status == "complete" else "loss_at_least"] = outcome.loss
        if self.space is not None:
            metrics["average"] = self.space.average(trial.levels)
            if self.space.ranged:
                metrics["cost"] = float(self.space.cost(trial.levels))
        params = {
            "levels": shown(encode_levels(trial.levels), LONGEST_PARAM, "the journal"),
            "generation": str(outcome.terms.generation),
            "stage": str(outcome.terms.stage),
            "minibatch": str(outcome.minibatch),
        }
        if len(self.unit_keys) <= UNITS_SHOWN:
            params |= self.units(trial.levels)
        tags = {"kind": "trial", "search": self.search, "trial": str(trial.number), "status": outcome.status}
        tags["problem"] = str(self.header.get("problem", ""))
        if trial.parent is not None:
            tags["parent_trial"] = str(trial.parent)
        tags |= {k: v for k, v in (("note", trial.note), ("reason", outcome.reason)) if v}
        return ChildRun(
            trial=trial.number,
            name=f"{self.name[: LONGEST_NAME - 12]} t{trial.number:04d}",
            status="FAILED" if outcome.status == "failed" else "FINISHED",
            start=when - int(1000 * outcome.seconds),
            end=when,
            tags={k: shown(v, LONGEST_TAG, "the journal") for k, v in tags.items()},
            params=params,
            metrics=metrics,
        )

    def units(self, levels: Sequence[int]) -> dict[str, str]:
        """The label of each unit's level, as parameters."""
        if self.space is None:
            return {}
        return dict(zip(self.unit_keys, self.space.labels(levels).values(), strict=True))
