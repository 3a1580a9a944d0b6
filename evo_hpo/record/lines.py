"""The lines of a journal as values, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from evo_hpo.search.budget import KINDS
from evo_hpo.search.checkpoint import Checkpoint, FrontPoint
from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.search.trial import Measured, Outcome, Probe, Terms, Trial
from evo_hpo.space.compression_space import Assignment

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_VALUES = {c: i for i, c in enumerate(DIGITS)}


def encode_levels(levels: Sequence[int]) -> str:
    """Levels as text: one character (0-9a-z) a unit; ``,40,3`` where a unit has more than 36 levels."""
    if max(levels) < len(DIGITS):
        return "".join([DIGITS[k] for k in levels])
    return "".join(f",{k}" for k in levels)


def decode_levels(text: str) -> Assignment:
    """The levels that :func:`encode_levels` wrote."""
    if text.startswith(","):
        return tuple(map(int, text[1:].split(",")))
    return tuple([_VALUES[c] for c in text])


def encode_number(value: float) -> float | str:
    """A number that JSON can hold: inf and NaN become text."""
    return value if math.isfinite(value) else str(value)


def encode_outcome(outcome: Outcome, search: str, time: float, more: int, cost: int | None = None) -> dict[str, Any]:
    """One outcome line; fields at their defaults are left out. ``cost``: of the assignment, over a range of budgets."""
    trial, terms = outcome.trial, outcome.terms
    line: dict[str, Any] = {
        "kind": "outcome",
        "search": search,
        "trial": trial.number,
        "levels": encode_levels(trial.levels),
        "loss": encode_number(outcome.loss),
        "tokens": outcome.tokens,
        "minibatch": outcome.minibatch,
        "draw": terms.draw,
        "seconds": round(outcome.seconds, 9),
        "status": outcome.status,
        "generation": terms.generation,
        "stage": terms.stage,
        "parent": trial.parent,
        "time": time,
    }
    optional = {"asked": terms.tokens, "keep": terms.keep, "note": trial.note, "reason": outcome.reason, "more": more}
    line.update({key: value for key, value in (optional | {"cost": cost}).items() if value not in (None, "", 0)})
    if terms.tokens == 0:
        line["asked"] = 0
    if terms.by_sequence:
        line["by_sequence"] = outcome.by_sequence
    return line


def decode_outcome(line: Mapping[str, Any]) -> Outcome:
    """The outcome of an outcome line."""
    trial = Trial(
        number=line["trial"],
        levels=decode_levels(line["levels"]),
        parent=line["parent"],
        note=line.get("note", ""),
    )
    terms = Terms(
        tokens=line.get("asked"),
        draw=line["draw"],
        keep=line.get("keep"),
        generation=line["generation"],
        stage=line["stage"],
        by_sequence="by_sequence" in line,
    )
    parts = line.get("by_sequence")
    return Outcome(
        trial=trial,
        loss=float(line["loss"]),
        tokens=line["tokens"],
        seconds=float(line["seconds"]),
        minibatch=line["minibatch"],
        status=line["status"],
        reason=line.get("reason", ""),
        terms=terms,
        by_sequence=None if parts is None else tuple(map(float, parts)),
    )


def encode_checkpoint(checkpoint: Checkpoint, search: str, time: float) -> dict[str, Any]:
    """One checkpoint line."""
    return {
        "kind": "checkpoint",
        "search": search,
        "fraction": checkpoint.fraction,
        **{kind: getattr(checkpoint, kind) for kind in KINDS},
        "levels": encode_levels(checkpoint.levels),
        "held_out": encode_figures(checkpoint.held_out),
        **({"front": [encode_point(point) for point in checkpoint.front]} if checkpoint.front else {}),
        "time": time,
    }


def encode_figures(figures: Mapping[str, float]) -> dict[str, float | str]:
    """Held-out figures by name."""
    return {key: encode_number(float(value)) for key, value in figures.items()}


def encode_point(point: FrontPoint) -> dict[str, Any]:
    """A point of a front."""
    found = {"levels": encode_levels(point.levels), "cost": point.cost, "loss": encode_number(point.loss)}
    return {**found, "held_out": encode_figures(point.held_out)}


def decode_point(entry: Mapping[str, Any]) -> FrontPoint:
    """The point that :func:`encode_point` wrote."""
    held_out = {key: float(value) for key, value in entry["held_out"].items()}
    return FrontPoint(decode_levels(entry["levels"]), entry["cost"], float(entry["loss"]), held_out)


def decode_checkpoint(line: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of a checkpoint line."""
    return Checkpoint(
        fraction=float(line["fraction"]),
        **{kind: line[kind] for kind in KINDS},
        levels=decode_levels(line["levels"]),
        held_out={key: float(value) for key, value in line["held_out"].items()},
        front=tuple(map(decode_point, line.get("front", ()))),
    )


def encode_probe(measured: Measured, search: str, time: float) -> dict[str, Any]:
    """One line of sensitivities, with all projections, so that a resumed search needs no second pass."""
    return {
        "kind": "probe",
        "search": search,
        "asked": measured.probe.tokens,
        "draw": measured.probe.draw,
        "minibatch": measured.minibatch,
        "seconds": round(measured.seconds, 9),
        **({"generated": True} if measured.probe.generated else {}),
        "sensitivities": measured.sensitivities.to_json(),
        "time": time,
    }


def decode_probe(line: Mapping[str, Any]) -> Measured:
    """What a line of sensitivities tells."""
    found = Sensitivities.from_json(line["sensitivities"])
    probe = Probe(
        found.reference, found.kind, line["asked"], line["draw"], found.form, generated=line.get("generated", False)
    )
    return Measured(probe, found, float(line["seconds"]), line["minibatch"])


def dump(line: Mapping[str, Any]) -> str:
    """One line of JSON; inf and NaN become text."""
    try:
        return json.dumps(line, separators=(",", ":"), allow_nan=False, default=_plain)
    except ValueError:  # inf or NaN somewhere inside
        return json.dumps(_finite(line), separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    """Numbers of numpy as Python's own, anything else (paths) as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if isinstance(value, float):
        return encode_number(value)
    return value if value is None or isinstance(value, (str, int)) else _plain(value)
