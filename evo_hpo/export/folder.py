"""The winning profile as a model that runs: a Hugging Face folder with the compressed weights in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evo_hpo.errors import ModelError, PlanError
from evo_hpo.export.published_layout import write_profile
from evo_hpo.levels.levels import Levels
from evo_hpo.models.experts import fuse_experts
from evo_hpo.models.loading import load_model, load_tokenizer
from evo_hpo.record.profiles import open_profile
from evo_hpo.scoring.task import Factory
from evo_hpo.search.registry import problem_factory

__all__ = ["export_profile", "place"]


def export_profile(profile: Path, output: Path) -> dict[str, Any]:
    """Writes the model that a profile describes, decoded to dense weights, with its tokenizer and the profile (as
    ``profile.json``, and as ``profile.txt`` with one ``layer: level`` line each).

    A dropped module keeps its place and gets zero weights, so that it contributes nothing and any library can load it.

    Args:
        profile: a file under a comparison's ``profiles/``.
        output: folder to make; must not exist.

    Returns:
        The profile.

    Raises:
        PlanError: not a profile of a language model, or the folder exists.
        StoreError: the level store is gone or is another model's.
    """
    if output.exists():
        raise PlanError(f"{output} exists already: name a new folder")
    data, _ = open_profile(profile)
    factory = problem_factory(data["problem"]["name"])
    if not isinstance(factory, Factory):
        raise PlanError(f"{profile} is of problem {data['problem']['name']!r}, which has no model to export")
    task = factory.task(data["problem"].get("settings", {}))
    levels = task.open_levels()
    assignment = task.space(levels).from_labels(data["units"])
    loaded = load_model(task.model)
    place(loaded.model, levels, assignment)
    loaded.model.save_pretrained(output)  # type: ignore[operator]
    load_tokenizer(task.model).save_pretrained(output)
    write_profile(output / "profile.txt", levels, assignment)
    (output / "profile.json").write_text(profile.read_text(encoding="utf-8"), encoding="utf-8")
    return data


def place(model: nn.Module, levels: Levels, assignment: Sequence[int]) -> None:
    """Puts the weights of an assignment into a model, in its own layout: it can be saved."""
    modules = dict(model.named_modules())
    for unit, level in enumerate(assignment):
        for name, weight in levels.weights(unit, level).items():
            _set(modules[name], weight)
    fuse_experts(model)


def _set(module: nn.Module, weight: torch.Tensor | None) -> None:
    """Puts a weight into a module, or silences the module: its output projection and biases become zero."""
    with torch.no_grad():
        if weight is not None:
            if not isinstance(module.weight, torch.Tensor):
                raise ModelError(f"{type(module).__name__} has no weight to replace")
            module.weight.copy_(weight)
            return
        for parameter in module.parameters():
            parameter.zero_()
