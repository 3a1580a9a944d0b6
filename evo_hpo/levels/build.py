"""From a model's name and a method to a level store on disk."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evo_hpo.errors import InvalidSettingError, UnknownNameError
from evo_hpo.models.paths import user_path
from evo_hpo.search.setting_types import annotations_of, check_types

if TYPE_CHECKING:
    from evo_hpo.levels.compressor import Compressor
    from evo_hpo.levels.store import LevelStore
    from evo_hpo.models.corpora import Spec

METHODS = ("gptq", "ggml", "sparsegpt", "rtn", "magnitude", "wanda", "drop")

_TYPES: dict[str, Any] = {
    **dict.fromkeys(("calibration_tokens", "sequence_length", "seed", "batch_tokens"), int),
    **dict.fromkeys(("include", "may_drop"), str),
    "exclude": str | None,
    "inputs": str | int | None,
    "kinds": str | Sequence[str],
}
"""Of settings that are no method's own."""

_LEAST = {"seed": 0, "calibration_tokens": 1, "sequence_length": 2, "batch_tokens": 1}
"""The first token of a sequence is predicted by nothing."""


def build(
    model: str,
    folder: str | Path,
    *,
    method: str = "gptq",
    levels: Sequence[float | int | str] | None = None,
    device: str | Sequence[str] = "cpu",
    dtype: str = "float32",
    calibration: Spec = "pydoc",
    calibration_tokens: int = 32768,
    sequence_length: int = 512,
    seed: int = 0,
    inputs: str | int | None = None,
    include: str = ".",
    exclude: str | None = None,
    batch_tokens: int = 1024,
    progress: Callable[..., None] | None = None,
    **settings: Any,
) -> LevelStore:
    """Build (or finish building) a level store; a store that is already complete is only checked and opened.

    Args:
        model: hub id, folder, .gguf file, or `pypi:<package>`.
        method: one of `METHODS`.
        levels: bits (gptq, rtn), types (ggml) or sparsities (sparsegpt, magnitude, wanda); default: the method's own.
        device: where layers are compressed, or several, as "cuda:0,cuda:1"; see `build_store`.
        calibration, calibration_tokens, sequence_length, seed: the text (see `load_tokens`), its `calibration` split.
        inputs: "dense", or a level's label to calibrate on the outputs of earlier blocks at that level; default: the
            level nearest to 3 bits, "dense" for sparsity.
        include, exclude: regular expressions over module names; of embedding and head only ``exclude`` counts.
        progress: called with (done, total, what).
        settings: further settings of the method, such as group_size=64 or symmetric=True.

    Raises:
        StoreError: the folder holds another store, or a damaged one.
        ModelError: an architecture that cannot be compressed or scored.
    """
    from evo_hpo.levels.blockwise import build_store
    from evo_hpo.levels.drop import build_drop_store
    from evo_hpo.levels.layer_jobs import usable_devices
    from evo_hpo.levels.store import open_store
    from evo_hpo.models.gates import GatedModel, example_tokens
    from evo_hpo.models.loading import compute_dtype, load_model
    from evo_hpo.models.structure import ROUTERS
    from evo_hpo.models.text import load_tokens

    text = {"calibration": calibration, "calibration_tokens": calibration_tokens, "sequence_length": sequence_length}
    names = {"inputs": inputs, "include": include, "exclude": exclude}
    check_settings(method, levels, {**text, **names, "seed": seed, "batch_tokens": batch_tokens, **settings})
    if method != "drop":
        usable_devices(device)
    folder = user_path(folder)
    loaded = load_model(model, compute_dtype(dtype))
    GatedModel(loaded.model, example_tokens(loaded.model))  # what cannot be scored is refused before it is compressed
    if method == "drop":
        build_drop_store(loaded, folder, **dropped(levels, settings))
        return open_store(folder, model=loaded.identity)
    compressor = make_compressor(method, levels, settings)
    tokens = None
    if compressor.needs != "nothing":
        tokens = load_tokens(
            calibration, loaded.tokenizer, sequence_length, calibration_tokens, seed, model=loaded.model
        )
    build_store(
        loaded,
        folder,
        compressor,
        tokens,
        inputs=_inputs(inputs, compressor),
        include=include,
        exclude=ROUTERS if exclude is None else exclude,
        device=device,
        batch_tokens=batch_tokens,
        text={"text": calibration, "seed": seed, "dtype": dtype},
        progress=progress,
    )
    return open_store(folder, model=loaded.identity)


def check_settings(method: str, levels: Sequence[float | int | str] | None, settings: dict[str, Any]) -> None:
    """Refuses what `build` would refuse of these settings, before anything is loaded.

    Raises:
        UnknownNameError: there is no such method.
        InvalidSettingError: it has no such setting, or the setting a value of another type or outside its range.
        TextError: the calibration text is no text, nor a mix of texts.
    """
    from evo_hpo.models.corpora import shares_of

    further = method_settings(settings)
    check_types(method, _TYPES, settings)
    shares_of(settings.get("calibration", "pydoc"))
    for name, least in _LEAST.items():
        if (given := settings.get(name, least)) < least:
            raise InvalidSettingError(f"{name}={given} must be {least} or more")
    for name in ("include", "exclude", "may_drop"):
        try:
            re.compile(settings.get(name) or "")
        except re.error as error:
            raise InvalidSettingError(f"{name}={settings[name]!r} is no regular expression: {error}") from error
    if method == "drop":
        from evo_hpo.levels.drop import check_kinds

        check_kinds(dropped(levels, further)["kinds"])
    else:
        _inputs(settings.get("inputs"), make_compressor(method, levels, further))


def method_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Of a build's settings those that are a method's own."""
    named = {name for name, p in inspect.signature(build).parameters.items() if p.kind is p.KEYWORD_ONLY}
    own = named - {"method", "levels", "device", "progress"}
    return {name: value for name, value in settings.items() if name not in own}


def make_compressor(method: str, levels: Sequence[float | int | str] | None, settings: dict[str, Any]) -> Compressor:
    """The compressor of this name.

    Raises:
        UnknownNameError: there is no such method.
        InvalidSettingError: it has no such setting.
    """
    from evo_hpo.levels.pruners import Magnitude, SparseGPT, Wanda
    from evo_hpo.levels.quantizers import GPTQ, RTN, Ggml

    classes: dict[str, type[Compressor]] = {c.name: c for c in (GPTQ, Ggml, SparseGPT, RTN, Magnitude, Wanda)}
    if method not in classes:
        raise UnknownNameError(f"no compression method {method!r}: use one of {', '.join(METHODS)}")
    chosen = classes[method]
    known = list(inspect.signature(chosen).parameters)
    unknown = sorted(set(settings) - set(known[1:]))
    if unknown:
        raise InvalidSettingError(f"{method} has no setting {unknown[0]!r}: it has {', '.join(known[1:])}")
    check_types(method, annotations_of(chosen), settings)
    if levels is None:
        return chosen(**settings)
    values = [_bits(v) for v in levels] if chosen in (GPTQ, RTN) else list(levels)
    return chosen(values, **settings)  # type: ignore[call-arg]


def default_folder(
    model: str, method: str, levels: Sequence[float | int | str] | None, settings: dict[str, Any]
) -> Path:
    """Where a store goes that was given no folder: under the cache, named after the content of what decides about it.

    Args:
        settings: those of `build` that differ from its defaults, the calibration text among them.
    """
    from evo_hpo.models.corpora import local_files, shares_of
    from evo_hpo.models.identity import digest, folder_identity, text_identity, tokenizer_identity
    from evo_hpo.models.loading import load_tokenizer, resolve_folder
    from evo_hpo.models.paths import cache_folder

    own = {k: p.default for k, p in inspect.signature(build).parameters.items() if p.default is not p.empty}
    text = {k: settings.get(k, own[k]) for k in ("calibration_tokens", "sequence_length", "seed", "inputs")}
    chosen = {k: v for k, v in settings.items() if k not in own}
    decides: dict[str, Any] = {k: settings.get(k, own[k]) for k in ("include", "exclude", "dtype")}
    labels: Sequence[str] = ()
    if method == "drop":
        decides |= dropped(levels, chosen)
    else:
        compressor = make_compressor(method, levels, chosen)
        decides, labels = decides | compressor.settings(), compressor.labels
        if compressor.needs != "nothing":
            parts = shares_of(settings.get("calibration", own["calibration"]))
            texts = [(text_identity(spec, local_files(spec)), share) for spec, share in parts.items()]
            text["inputs"] = None if text["inputs"] is None else str(text["inputs"])  # 3 and "3" are the same level
            decides |= text | {"text": texts if len(texts) > 1 else texts[0][0]}
            decides |= {"tokenizer": tokenizer_identity(load_tokenizer(model))}
    identity = folder_identity(resolve_folder(model))
    name = re.sub(r"[^\w.=-]", "-", "-".join([Path(model).name, method, *labels]), flags=re.ASCII)[:100]

    def called(decides: dict[str, Any]) -> Path:
        return cache_folder() / "stores" / f"{name}-{digest([json.dumps([identity, method, decides], sort_keys=True)])}"

    earlier = called(decides | {"sparsities": [str(v) for v in levels or ()]})  # named after sparsities as given
    return earlier if "sparsities" in decides and earlier.is_dir() else called(decides)


def summary(store: LevelStore) -> list[tuple[str, str, str, str, str]]:
    """One row for each level label: nominal bits, stored bits, share of weights kept, mean layer-wise error."""
    records = store.manifest.units
    labels = list(dict.fromkeys(level.label for record in records for level in record.levels))
    rows = []
    for label in labels:
        found = [(r.size, level) for r in records for level in r.levels if level.label == label]
        size = sum(s for s, _ in found)
        rows.append(
            (
                label,
                f"{sum(v.bits for _, v in found) / size:.3f}",
                f"{sum(v.storage for _, v in found) / size:.3f}",
                f"{sum(v.weights for _, v in found) / size:.4f}",
                f"{sum(v.error * s for s, v in found) / size:.6f}",
            )
        )
    return rows


def _bits(value: float | int | str) -> int:
    try:
        bits = int(float(value))
    except (ValueError, OverflowError):  # no number, or none that is finite
        bits = 0
    if not bits or float(value) != bits:
        raise InvalidSettingError(f"bit-width {value!r} must be a whole number from 1 to 8")
    return bits


def _inputs(inputs: str | int | None, compressor: Compressor) -> str:
    if inputs is not None:
        inputs = str(inputs)  # levels are named by their bits
        if inputs != "dense" and inputs not in compressor.everywhere:
            levels = ", ".join(compressor.everywhere)
            raise InvalidSettingError(f"inputs={inputs!r} must be 'dense'" + f" or one of {levels}" * bool(levels))
        return inputs
    if compressor.resource != "bits" or not compressor.everywhere:
        return "dense"
    return min(compressor.everywhere, key=lambda label: (abs(float(label) - 3), float(label)))


def dropped(levels: Sequence[float | int | str] | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What is dropped, from `kinds=` or from levels that are names; numbers among the levels mean nothing here."""
    unknown = sorted(set(settings) - {"kinds", "may_drop"})
    if unknown:
        raise InvalidSettingError(f"drop has no setting {unknown[0]!r}: it has kinds and may_drop")
    named = [str(v) for v in levels or () if not str(v).replace(".", "").isdigit()]
    kinds = settings.get("kinds") or named or ("attention", "mlp")
    return {"kinds": (kinds,) if isinstance(kinds, str) else tuple(kinds), "may_drop": settings.get("may_drop", ".")}
