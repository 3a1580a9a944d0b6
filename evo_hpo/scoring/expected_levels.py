"""Levels that are not built yet, with the bits and bytes that they will take; they have no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from evo_hpo.errors import StoreError
from evo_hpo.levels.build import check_settings, dropped, make_compressor, method_settings
from evo_hpo.levels.drop import records_of
from evo_hpo.levels.ggml import row_bytes
from evo_hpo.levels.level_set import Choice, LevelSet
from evo_hpo.levels.manifest import LevelRecord, UnitRecord
from evo_hpo.levels.quantizers import Ggml
from evo_hpo.models.experts import unfuse_experts
from evo_hpo.models.loading import load_tokenizer
from evo_hpo.models.paths import user_path
from evo_hpo.models.structure import ROUTERS, is_transposed, linear_modules, outer_matrices
from evo_hpo.scoring.footprint import SPARSE, configuration, empty_model
from evo_hpo.scoring.recipes import beside
from evo_hpo.scoring.score_cache import check_cache


class Unbuilt:
    """Has no weights to give."""

    def unit_weights(self, unit: str, label: str) -> Mapping[str, torch.Tensor | None]:
        raise StoreError(f"level {label} of {unit!r} is not built yet")

    def unit_encoded(self, unit: str, label: str) -> None:
        return None


def check_inputs(task: Any) -> None:
    """Reads the texts and tables that a task names and looks at its cache, before levels are built, which can take
    hours.

    Args:
        task: a :class:`~evo_hpo.scoring.task.LanguageModelTask`.

    Raises:
        InfeasibleError: nothing will keep the budgets. TextError: a text is missing or too short.
        InvalidSettingError: a table cannot be read or is of another model; or the cache is no file of losses.
    """
    task.limits.check(task.model)
    if task.cache:
        check_cache(user_path(task.cache))
    if not all((one.store_folder / "manifest.json").is_file() for one in (task, *beside(task))):
        task.space(expected_levels(task))
    task.texts.check(load_tokenizer(task.model))


def expected_levels(task: Any) -> LevelSet:
    """The levels of a task: those of its stores that are there, and those that will be built.

    Args:
        task: a :class:`~evo_hpo.scoring.task.LanguageModelTask`.

    Raises:
        StoreError: a store is not there, and its sizes are not known before it is built.
        InvalidSettingError: as for the task's levels.
    """
    sets, methods = [_own_levels(task)], []
    for given, other in zip(task.join, beside(task), strict=True):
        store = other.open_store(where="cpu") if isinstance(given, str) else None
        sets.append(store.levels if store else _own_levels(other))
        methods.append(store.manifest.plan.method if store else other.method)
    arranged: LevelSet = task.arranged(sets, methods)
    return arranged


def _own_levels(task: Any) -> LevelSet:
    """Those of a task's own store."""
    if (task.store_folder / "manifest.json").is_file():
        opened: LevelSet = task.open_store(where="cpu").levels
        return opened
    check_settings(task.method, task.levels or None, dict(task.build))
    model = empty_model(configuration(task.model))
    unfuse_experts(model)
    if task.method == "drop":
        records = records_of(model, **dropped(task.levels or None, method_settings(dict(task.build))))
        return LevelSet([(r.name, [[Choice(Unbuilt(), r, level)] for level in r.levels]) for r in records], "modules")
    built = task.build_settings
    exclude = built.get("exclude", ROUTERS) or ""
    outer = outer_matrices(model) if built.get("embedding", False) else {}
    outer = {name: module for name, module in outer.items() if not (exclude and re.search(exclude, name))}
    found = {**outer, **linear_modules(model, built.get("include", "."), exclude)}
    rows = []
    for name, module in found.items():
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        shape = (weight.shape[1], weight.shape[0]) if is_transposed(module) else (weight.shape[0], weight.shape[1])
        levels = KINDS.get(task.method, _sparse)(task, shape)
        if not levels:
            continue  # it stays as it is
        record = UnitRecord(name, (name,), shape, weight.numel(), is_transposed(module), levels)
        rows.append((name, [[Choice(Unbuilt(), record, level)] for level in levels]))
    return LevelSet(rows, "weights" if task.method in SPARSE else "bits")


def _quantized(task: Any, shape: tuple[int, int]) -> tuple[LevelRecord, ...]:
    built = task.build_settings
    size, zeros = int(built.get("group_size", 64)) or shape[1], not built.get("symmetric", False)
    quantizer: Any = make_compressor(task.method, task.levels or None, {})
    return tuple(_level(bits, shape, size, zeros) for bits in quantizer.bits)


def _ggml(task: Any, shape: tuple[int, int]) -> tuple[LevelRecord, ...]:
    kinds = Ggml(task.levels) if task.levels else Ggml()
    weights, rows = shape[0] * shape[1], shape[0]
    found = {kind: 8 * rows * row_bytes(kind, shape[1]) for kind in kinds.offered(*shape)}
    return tuple(
        LevelRecord(kind, bits, weights, 1, bits, float("nan"), {"kind": "ggml", "type": kind})
        for kind, bits in found.items()
    )


def _sparse(task: Any, shape: tuple[int, int]) -> tuple[LevelRecord, ...]:
    pruner: Any = make_compressor(task.method, task.levels or None, method_settings(dict(task.build)))
    size, width = shape[0] * shape[1], 32 if pruner.values == "float32" else 16
    kept = {level.label: size - level.removed(size) for level in pruner.fitting(size)}
    return tuple(
        LevelRecord(label, 16 * n, n, 1, 8 * -(-size // 8) + width * n, float("nan"), {"kind": "sparse"})
        for label, n in kept.items()
    )


def _level(bits: int, shape: tuple[int, int], group_size: int, zeros: bool) -> LevelRecord:
    weights = shape[0] * shape[1]
    groups = shape[0] * -(-shape[1] // group_size)
    storage = -(-weights // 8) * bits * 8 + (24 if zeros and bits > 1 else 16) * groups
    settings = {"kind": "quantized", "bits": bits, "shape": list(shape), "group_size": group_size}
    return LevelRecord(str(bits), bits * weights, weights, 1, storage, float("nan"), settings)


KINDS = {"gptq": _quantized, "rtn": _quantized, "ggml": _ggml}
"""What levels of a method are expected; of all others, sparse ones."""
