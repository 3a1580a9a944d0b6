"""Models as they are served: folders of packed weights beside everything that :mod:`evo_hpo.models.loading` reads.

Packed weights need the package compressed-tensors (extra `compressed-tensors`).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from evo_hpo.errors import MissingPackageError, ModelError
from evo_hpo.export.packed_folder import rewrite_index
from evo_hpo.models.experts import unfuse_experts
from evo_hpo.models.identity import folder_identity, weight_files
from evo_hpo.models.loading import LoadedModel, load_model, one_line, quiet_transformers
from evo_hpo.models.paths import user_path

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
"""What the format stores of a module."""


def load_served(spec: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A model by its name, also a folder in the format compressed-tensors, with dense weights in memory.

    transformers itself loads what it can; zero points and packed experts, which it cannot, are unpacked by the package
    compressed-tensors first.

    Raises:
        MissingPackageError: a folder of packed weights, without the package.
        ModelError: it cannot be loaded.
    """
    folder = user_path(spec)
    config = _config(folder)
    packed = config.get("quantization_config") if isinstance(config, Mapping) else None
    if not isinstance(packed, Mapping) or packed.get("quant_method") != "compressed-tensors":
        return load_model(spec, dtype)  # which refuses what is neither
    if find_spec("compressed_tensors") is None:
        raise MissingPackageError(f"{spec} has packed weights: pip install 'evo-hpo[compressed-tensors]'")
    tokenizer = load_tokenizer_of(folder)
    try:
        model = _by_transformers(folder, dtype) if _is_plain(packed) else _unpacked(folder, config, dtype)
    except ModelError:
        raise
    except Exception as error:  # whatever a damaged folder makes the libraries raise
        raise ModelError(f"cannot load the packed weights in {spec!r}: {one_line(error)}") from error
    unfuse_experts(model)
    model.requires_grad_(False).train(False)
    model.config.use_cache = False
    return LoadedModel(model, tokenizer, folder_identity(folder), spec)


def load_tokenizer_of(folder: Path) -> Any:
    """The tokenizer that lies in a folder of packed weights."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # as for models
        raise ModelError(f"cannot load a tokenizer from {str(folder)!r}: {one_line(error)}") from error


def size_of(spec: str) -> int:
    """Bytes of the weight files of a model that lies in a folder or a GGUF file; 0 where it cannot be told."""
    path = user_path(spec)
    files = [path] if path.is_file() else weight_files(path) if path.is_dir() else []
    return sum(file.stat().st_size for file in files)


def _config(folder: Path) -> Any:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_plain(packed: Mapping[str, Any]) -> bool:
    """Whether transformers loads the groups: no zero points, no experts."""
    groups = packed["config_groups"].values()
    experts = any(".experts." in name for group in groups for name in group["targets"])
    return not experts and all(group["weights"]["symmetric"] for group in groups)


def _by_transformers(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM
    with quiet_transformers():
        model, info = load.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64))  # weights are unpacked at the first pass
    if lost := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise ModelError(f"transformers finds {lost[0]!r} missing, unexpected or of another shape in {str(folder)!r}")
    return model


def _unpacked(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """Through a folder of dense weights, which is gone afterwards."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file, save_file

    compressor: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    groups = [QuantizationScheme(**group) for group in config["quantization_config"]["config_groups"].values()]
    schemes = {name: scheme for scheme in groups for name in scheme.targets}
    with tempfile.TemporaryDirectory() as made:
        shutil.copytree(folder, made, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        for path in sorted(folder.glob("*.safetensors")):
            tensors = load_file(path)
            for name in {key.rpartition(".")[0] for key in tensors if key.endswith(".weight_packed")}:
                parts = {key: tensors.pop(f"{name}.{key}") for key in PARTS if f"{name}.{key}" in tensors}
                tensors[f"{name}.weight"] = compressor.decompress(parts, schemes[name])["weight"].to(dtype)
            save_file(tensors, Path(made) / path.name, {"format": "pt"})
        rewrite_index(Path(made))
        dense = {key: value for key, value in config.items() if key != "quantization_config"}
        (Path(made) / "config.json").write_text(json.dumps(dense), encoding="utf-8")
        return load_model(made, dtype).model
