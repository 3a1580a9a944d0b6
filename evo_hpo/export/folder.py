"""The winning profile as a model that runs: a Hugging Face folder with the compressed weights in place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evo_hpo.errors import InvalidSettingError, MissingPackageError, ModelError, PlanError
from evo_hpo.export.card import Card
from evo_hpo.export.figures import Estimate, measure
from evo_hpo.export.packed_folder import refuse_unservable, write_packed
from evo_hpo.export.published_layout import write_level_lines
from evo_hpo.export.reading import load_served, size_of
from evo_hpo.files import as_readable_as, made_whole
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.levels.levels import Levels
from evo_hpo.levels.packing import Encoded
from evo_hpo.models.experts import fuse_experts
from evo_hpo.models.identity import differences, tokenizer_identity, warn_unchecked
from evo_hpo.models.loading import LoadedModel, compute_dtype, load_model, quiet_transformers, refuse_non_finite
from evo_hpo.models.mixed import MIXED, matrix_dtype
from evo_hpo.models.paths import place_for
from evo_hpo.record.profiles import open_profile
from evo_hpo.scoring.arithmetic import InputRounding, inputs_of
from evo_hpo.scoring.factory import Factory
from evo_hpo.scoring.footprint import configuration
from evo_hpo.scoring.task import LanguageModelTask
from evo_hpo.search.registry import problem_factory, signature_kept


def export_profile(
    profile: Path, output: Path, dtype: str = "", format: str = "dense", *, check: bool = True
) -> dict[str, Any]:
    """Writes the model that a profile describes, with its tokenizer, the profile (as ``profile.json``, and as
    ``profile.txt`` with one ``layer: level`` line each) and a model card; loads it back once and compares its KL.

    A dropped module keeps its place and gets zero weights, so that it contributes nothing and any library can load it.

    Args:
        profile: a file under a comparison's ``profiles/``.
        output: folder to make; must not exist.
        dtype: of the weights that are dense; empty: the model's own, or with packed weights a 16-bit one.
        format: ``dense``, or ``compressed-tensors`` for packed integers; see :mod:`evo_hpo.export.packed_folder`.
        check: load what was written, and compare its KL on the held-out text with the profile's.

    Returns:
        The profile, with ``bytes`` of the weight files, what was ``checked``, and what the budget ``counted``.

    Raises:
        PlanError: not a profile of a language model, or the folder exists; or model, tokenizer or level store are
            others than those that the profile was found with: the message names which; or it cannot be served.
        StoreError: the level store is gone or is another model's.
        ModelError: what was written does not compute what the search found; nothing is left then.
    """
    if format not in ("dense", "compressed-tensors"):
        raise InvalidSettingError(f"format={format!r} must be dense or compressed-tensors, or name a FILE.gguf")
    packs = format == "compressed-tensors"
    if packs and check and find_spec("compressed_tensors") is None:
        raise MissingPackageError("to load packed weights back: pip install 'evo-hpo[compressed-tensors]'")
    with place_for(output) as place_to:
        data, loaded, levels, assignment = opened(profile, place_to, dtype)
        model: Any = loaded.model
        task = task_of(data)
        encoded: dict[str, Encoded] = {}
        if packs:
            refuse_unservable(profile, levels, assignment, task.serve)
            encoded = {n: e for u, level in enumerate(assignment) for n, e in levels.encoded(u, level).items()}
            if not dtype and model.dtype == torch.float32:
                model.to(torch.float16)
        inputs = inputs_of(task.arithmetic, task.model, model, levels)
        place(model, levels, assignment)
        for name, tensor in model.state_dict().items():
            refuse_non_finite(name, tensor)
        model.config.use_cache = getattr(configuration(task.model), "use_cache", True)  # which scoring has turned off
        with made_whole(place_to) as folder:
            with quiet_transformers():
                model.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
            if packs:
                write_packed(folder, loaded, encoded)
            as_readable_as(folder / "config.json", folder.glob("*.safetensors"))
            write_level_lines(folder / "profile.txt", levels, assignment)
            (folder / "profile.json").write_text(profile.read_text(encoding="utf-8"), encoding="utf-8")
            types = {} if inputs is None else inputs.at(assignment)
            checked = _loaded_back(folder, data, task, types) if check else "not done"
            size, weights = size_of(str(folder)), sum({id(p): p.numel() for p in model.parameters()}.values())
            kind = str(model.dtype).removeprefix("torch.")
            card = Card(data, profile, levels, assignment, format, kind, size, weights, checked)
            (folder / "README.md").write_text(card.text(), encoding="utf-8")
        return {**data, "bytes": size, "checked": checked, "counted": card.average()}


def _loaded_back(folder: Path, data: Mapping[str, Any], task: LanguageModelTask, types: Mapping[str, str]) -> str:
    """Loads what was written and compares its KL on the first held-out text with what the search found.

    Args:
        types: what the search rounded inputs to.

    Raises:
        ModelError: they differ by more than the dtypes explain.
    """
    recorded = ((data.get("fingerprint") or {}).get("identity") or {}).get("dtype", "float32")
    dtype = matrix_dtype(recorded)
    original, again = load_model(task.model, dtype), load_served(str(folder), dtype)
    InputRounding(again.model, types)
    text = next(iter(task.texts.judged(original.tokenizer, original.model).values()))
    found = Estimate.of(measure(again.model, text, original.model).divergence).mean
    wanted = float(data["held_out"]["loss"])
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype", recorded)
    share, least = (0.05, 2e-3) if {"bfloat16", MIXED} & {recorded, saved} else (0.01, 2e-4)
    if not abs(found - wanted) <= share * abs(wanted) + least:
        raise ModelError(
            f"what was written has a KL of {found:.6g} nats a token on the held-out text, the search found"
            f" {wanted:.6g}: model, text or libraries are not what they were; --no-check writes it all the same"
        )
    return f"KL {found:.5g} nats a token on the held-out text, the search found {wanted:.5g}"


def task_of(data: Mapping[str, Any]) -> LanguageModelTask:
    """The task that a profile was found on.

    Raises:
        PlanError: it is of no language model. InvalidSettingError: a setting that there is not, or of a wrong type.
    """
    name, settings = data["problem"]["name"], data["problem"].get("settings", {})
    factory = problem_factory(name)
    if not isinstance(factory, Factory):
        raise PlanError(f"the profile is of problem {name!r}, which has no model to export")
    with signature_kept(f"problem {name!r}", factory, **settings):
        task: LanguageModelTask = factory.task(settings)
    return task


def opened(
    profile: Path, output: Path, dtype: str = ""
) -> tuple[dict[str, Any], LoadedModel, LevelSet, tuple[int, ...]]:
    """What an export to `output` needs: the profile, its model, its levels, and which of them it takes.

    Raises:
        PlanError, StoreError: as :func:`export_profile`.
    """
    if output.exists():
        raise PlanError(f"{output} exists already: name another")
    return read_profile(profile, compute_dtype(dtype) if dtype else None)


def read_profile(
    profile: Path, dtype: torch.dtype | None
) -> tuple[dict[str, Any], LoadedModel, LevelSet, tuple[int, ...]]:
    """A profile, its uncompressed model, its levels, and which of them it takes.

    Raises:
        PlanError, StoreError: as :func:`export_profile`.
    """
    data, _ = open_profile(profile)
    task = task_of(data)
    loaded = load_model(task.model, dtype)
    identity = {**loaded.identity, "tokenizer": tokenizer_identity(loaded.tokenizer)}
    _refuse_others(profile, data, identity)
    levels = task.open_levels(loaded.identity, where="cpu")  # wherever they were searched
    _refuse_others(profile, data, {"store": levels.fingerprint})
    every = levels.space(budget=10**15)  # budgets are of searches, and the tables that they need may be gone
    return data, loaded, levels, every.from_labels(data["units"])


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


def place(model: nn.Module, levels: Levels, assignment: Sequence[int], *, fuse: bool = True) -> None:
    """Puts the weights of an assignment into a model, in its own layout: it can be saved.

    Args:
        fuse: experts too; else each is a module of its own, as in memory.
    """
    modules = dict(model.named_modules())
    for unit, level in enumerate(assignment):
        for name, weight in levels.weights(unit, level).items():
            _set(name, modules[name], weight)
    if fuse:
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
