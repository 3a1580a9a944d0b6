"""The winning profile as a model that runs: a Hugging Face folder with the compressed weights in place."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evo_hpo.errors import ModelError, PlanError
from evo_hpo.export.published_layout import write_level_lines
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.levels.levels import Levels
from evo_hpo.models.experts import fuse_experts
from evo_hpo.models.identity import differences, tokenizer_identity, warn_unchecked
from evo_hpo.models.loading import LoadedModel, compute_dtype, load_model, made_folder, refuse_non_finite
from evo_hpo.record.profiles import open_profile
from evo_hpo.scoring.task import Factory
from evo_hpo.search.registry import problem_factory

__all__ = ["export_profile", "opened", "place"]


def export_profile(profile: Path, output: Path, dtype: str = "") -> dict[str, Any]:
    """Writes the model that a profile describes, decoded to dense weights, with its tokenizer and the profile (as
    ``profile.json``, and as ``profile.txt`` with one ``layer: level`` line each).

    A dropped module keeps its place and gets zero weights, so that it contributes nothing and any library can load it.

    Args:
        profile: a file under a comparison's ``profiles/``.
        output: folder to make; must not exist.
        dtype: of the weights that are written; empty: the model's own.

    Returns:
        The profile.

    Raises:
        PlanError: not a profile of a language model, or the folder exists; or model, tokenizer or level store are
            others than those that the profile was found with: the message names which.
        StoreError: the level store is gone or is another model's.
    """
    data, loaded, levels, assignment = opened(profile, output, dtype)
    place(loaded.model, levels, assignment)
    with _whole(output) as folder:
        loaded.model.save_pretrained(folder)  # type: ignore[operator]
        loaded.tokenizer.save_pretrained(folder)
        write_level_lines(folder / "profile.txt", levels, assignment)
        (folder / "profile.json").write_text(profile.read_text(encoding="utf-8"), encoding="utf-8")
    return data


def opened(
    profile: Path, output: Path, dtype: str = ""
) -> tuple[dict[str, Any], LoadedModel, LevelSet, tuple[int, ...]]:
    """What an export to `output` needs: the profile, its model, its levels, and which of them it takes.

    Raises:
        PlanError, StoreError: as :func:`export_profile`.
    """
    if output.exists():
        raise PlanError(f"{output} exists already: name another")
    made_folder(output.parent)
    data, _ = open_profile(profile)
    factory = problem_factory(data["problem"]["name"])
    if not isinstance(factory, Factory):
        raise PlanError(f"{profile} is of problem {data['problem']['name']!r}, which has no model to export")
    task = factory.task(data["problem"].get("settings", {}))
    loaded = load_model(task.model, compute_dtype(dtype) if dtype else None)
    identity = {**loaded.identity, "tokenizer": tokenizer_identity(loaded.tokenizer)}
    _refuse_others(profile, data, identity)
    levels = task.open_levels(loaded.identity)
    _refuse_others(profile, data, {"store": levels.fingerprint})
    return data, loaded, levels, task.space(levels).from_labels(data["units"])


@contextlib.contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """A folder beside the output that takes its place once all is written; or else nothing is left behind."""
    part = output.with_name(f".{output.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield part
        part.rename(output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _refuse_others(profile: Path, data: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Raises PlanError where what is there is not what the profile was found with."""
    recorded = (data.get("fingerprint") or {}).get("identity")
    if not recorded:
        if "store" in found:  # once
            warn_unchecked(f"the profile {profile}")
    elif other := differences(recorded, found):
        raise PlanError(
            f"{profile} was found with another {other}: its losses are not those of this export; restore what it was"
            " found with, or search again"
        )


def place(model: nn.Module, levels: Levels, assignment: Sequence[int]) -> None:
    """Puts the weights of an assignment into a model, in its own layout: it can be saved."""
    modules = dict(model.named_modules())
    for unit, level in enumerate(assignment):
        for name, weight in levels.weights(unit, level).items():
            _set(name, modules[name], weight)
    fuse_experts(model)


def _set(name: str, module: nn.Module, weight: torch.Tensor | None) -> None:
    """Puts a weight into a module, or silences the module: its output projection and biases become zero."""
    with torch.no_grad():
        if weight is not None:
            if not isinstance(module.weight, torch.Tensor):
                raise ModelError(f"{type(module).__name__} has no weight to replace")
            module.weight.copy_(weight)
            refuse_non_finite(f"{name}.weight", module.weight)
            return
        for parameter in module.parameters():
            parameter.zero_()
