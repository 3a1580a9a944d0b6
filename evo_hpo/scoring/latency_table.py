"""How long a token takes in each layer at each level, as measured in one program on one machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.level_set import Choice, LevelSet
from evo_hpo.scoring.footprint import ModelShape

FORMAT = 1
SIZES = ("blocks", "hidden", "vocabulary", "key_values")
"""Of :class:`ModelShape`, those that decide about the time of a model's unsearched part."""

Layer = tuple[int, int, str]
"""Outputs and inputs of a layer, and the label of its level."""


def layer_of(choice: Choice) -> Layer:
    """What a table knows a layer at a level by."""
    rows, columns = choice.unit.shape
    return rows, columns, choice.level.label


def takes_time(choice: Choice, program: str) -> bool:
    """Whether a program runs a layer at a level: a dropped one is nothing, but zeros that llama.cpp multiplies."""
    return program == "llama.cpp" or choice.level.settings.get("kind") != "dropped"


@dataclass(frozen=True)
class LatencyTable:
    """Nanoseconds a token.

    Attributes:
        machine, program, version, threads: where and with what it was measured.
        depth: tokens of the text before the first one that was timed.
        model: sizes of the model that `rest` is of.
        rest: all that is not searched: attention, norms, embedding, head.
        times: of each layer.
        checked: predictions against whole models of random levels: what :func:`agreement` tells, and each of them;
            and against those that `rest` is the mean of (`references`).
    """

    machine: str
    program: str
    version: str
    threads: int
    depth: int
    model: Mapping[str, int]
    rest: int
    times: Mapping[Layer, int]
    checked: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> LatencyTable:
        """The table in a file.

        Raises:
            InvalidSettingError: there is none, or it is no table.
        """
        try:
            data = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            times = {(int(r["shape"][0]), int(r["shape"][1]), str(r["level"])): r["ns"] for r in data["layers"]}
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}")
            own = {name: data[name] for name in ("machine", "program", "version", "threads", "depth", "model", "rest")}
            numbers = [own["threads"], own["depth"], own["rest"], *own["model"].values(), *times.values()]
            if wrong := [one for one in numbers if type(one) is not int or one < 0]:
                raise ValueError(f"{wrong[0]!r} must be a whole number from 0")
            if set(own["model"]) != set(SIZES):
                raise ValueError(f"model must have {', '.join(SIZES)}")
            return cls(**own, times=times, checked=dict(data.get("checked") or {}))
        except OSError as error:
            raise InvalidSettingError(
                f"latency_table={str(path)!r} cannot be read ({error.strerror}): measure one with evo-hpo latency"
            ) from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, UnicodeDecodeError) as error:
            raise InvalidSettingError(
                f"latency_table={str(path)!r} is no table of this version ({error}): measure one with evo-hpo latency"
            ) from None

    def text(self) -> str:
        """What :meth:`read` reads."""
        names = ("machine", "program", "version", "threads", "depth", "model", "rest", "checked")
        layers = [
            {"shape": [rows, columns], "level": label, "ns": ns} for (rows, columns, label), ns in self.times.items()
        ]
        return json.dumps({"format": FORMAT, **{n: getattr(self, n) for n in names}, "layers": layers}, indent=1) + "\n"

    @property
    def place(self) -> str:
        """Machine and program in a few words."""
        return f"{self.machine}, {self.program} {self.version}, {self.threads} thread{'s' * (self.threads > 1)}"

    def costs(self, levels: LevelSet) -> list[tuple[int, ...]]:
        """Nanoseconds a token of each unit's levels, tied layers together.

        Raises:
            InvalidSettingError: a layer is not in the table, or one is outside the blocks.
        """
        check_blocks(levels)
        return [tuple(sum(map(self._time, level)) for level in choices) for _, choices in levels.rows()]

    def total(self, levels: LevelSet, assignment: Sequence[int]) -> int:
        """Nanoseconds that a token takes in the whole model."""
        return self.rest + sum(row[level] for row, level in zip(self.costs(levels), assignment, strict=True))

    def reach(self, levels: LevelSet) -> tuple[int, int]:
        """Nanoseconds that a token takes in the whole model at least and at most."""
        costs = self.costs(levels)
        return self.rest + sum(map(min, costs)), self.rest + sum(map(max, costs))

    def _time(self, choice: Choice) -> int:
        if not takes_time(choice, self.program):
            return 0
        layer = layer_of(choice)
        if layer not in self.times:
            rows, columns, label = layer
            shapes = " ".join(dict.fromkeys(f"{r}x{c}" for r, c, _ in self.times))
            known = [one for r, c, one in self.times if (r, c) == (rows, columns)]
            what = f"levels {', '.join(known)} of it" if known else f"layers of {shapes}"
            raise InvalidSettingError(
                f"the latency table has no time of a {rows}x{columns} layer at {label}, only {what}:"
                " measure one for this plan with evo-hpo latency"
            )
        return self.times[layer]

    def check_model(self, shape: ModelShape) -> None:
        """Raises InvalidSettingError where the model is of other sizes than the one that was measured."""
        if (found := sizes_of(shape)) != dict(self.model):
            told = ("{blocks} blocks of width {hidden}, {vocabulary} entries".format(**m) for m in (self.model, found))
            raise InvalidSettingError(
                "the latency table is of another model ({}; this one has {}): measure one for this plan with"
                " evo-hpo latency".format(*told)
            )


def check_blocks(levels: LevelSet) -> None:
    """Raises InvalidSettingError where embedding or head are searched: their time is part of the rest."""
    for unit in levels.units:
        if unit.block is None:
            raise InvalidSettingError(
                f"{unit.name!r}: no latency is measured outside the blocks; leave out build = {{ embedding = true }}"
            )


def sizes_of(shape: ModelShape) -> dict[str, int]:
    """Those of a model."""
    return {name: getattr(shape, name) for name in SIZES}


def agreement(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """Spearman's rank correlation (0 where all are alike), and relative errors: mean and largest, of their size."""
    from scipy.stats import spearmanr

    alike = min(predicted) == max(predicted) or min(measured) == max(measured)
    errors = [abs(p - m) / m for p, m in zip(predicted, measured, strict=True)]
    return {
        "rank_correlation": 0.0 if alike else round(float(spearmanr(predicted, measured).statistic), 4),
        "mean_error": round(sum(errors) / len(errors), 4),
        "largest_error": round(max(errors), 4),
    }
