"""What a model, a tokenizer and a text are, by content: the same wherever they lie and whatever they are called.

An identity is a mapping from what it is of ("model weights", "tokenizer", ...) to a hash of all of its content. Stores,
journals, profiles and cached losses carry one; who uses them compares it with what is there and says what differs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

WEIGHTS, CONFIGURATION = "model weights", "model configuration"

_NO_OUTPUT = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
"""Keys of a configuration that change no output: dtype is always chosen by the caller."""

_log = logging.getLogger("evo_hpo")


def digest(parts: Iterable[str | bytes | memoryview]) -> str:
    """Hash (16 hex digits) of a sequence of parts, each with its length."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(f"{len(data)}:".encode())
        found.update(data)
    return found.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file, read once a process while it is unchanged."""
    stat = path.stat()
    return _file_digest(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.lru_cache(maxsize=1024)
def _file_digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_identity(folder: Path) -> dict[str, str]:
    """Weights and configuration of a model's folder: all bytes of :func:`weight_files`, about 1 GB a second.

    Names of files and what changes no output do not count, nor does the dtype the weights are loaded in.
    """
    with ThreadPoolExecutor() as threads:
        files = list(threads.map(file_digest, weight_files(folder)))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    code = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return {WEIGHTS: digest(files), CONFIGURATION: digest([_canonical(config), *code])}


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that transformers loads: of several sets the one that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            index = json.loads((folder / f"{name}.index.json").read_text(encoding="utf-8"))
            return sorted(path for part in set(index["weight_map"].values()) if (path := folder / part).is_file())
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def model_identity(model: nn.Module) -> dict[str, str]:
    """Weights (every value, in the dtype they have) and configuration of a model in memory."""
    found, seen = hashlib.sha256(), set[tuple[int, torch.Size]]()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        if (key := (tensor.data_ptr(), tensor.shape)) not in seen:  # a tied head is read once
            seen.add(key)
            found.update(_bytes(tensor))
    config: Any = getattr(model, "config", None)
    return {WEIGHTS: found.hexdigest()[:16], CONFIGURATION: digest([_canonical(config.to_dict() if config else {})])}


def tokenizer_identity(tokenizer: Any) -> str:
    """Everything that decides which tokens a text becomes."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    ends = [str(getattr(tokenizer, name, None)) for name in ("bos_token_id", "eos_token_id")]
    if hasattr(backend, "to_str"):
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
        return digest([json.dumps(rules), *ends])
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else len(tokenizer)
    file = getattr(tokenizer, "vocab_file", None)
    model = file_digest(Path(file)) if file and Path(file).is_file() else ""
    probe = tokenizer("The quick brown fox; def f(x):\n    return 3.14", add_special_tokens=False)["input_ids"]
    return digest([type(tokenizer).__name__, json.dumps([vocabulary, probe], sort_keys=True), model, *ends])


def tokens_identity(tokens: torch.Tensor) -> str:
    """Token ids, sequences x length, in their order."""
    return digest([str(tuple(tokens.shape)), _bytes(tokens.to(torch.int64))])


def text_identity(spec: str, files: Iterable[Path]) -> str:
    """A text before it is tokenized: the content of its files, or the name of what has none here."""
    found = [file_digest(path) for path in files]
    return digest(found or [spec])


def differences(recorded: Mapping[str, str], found: Mapping[str, str]) -> str:
    """What is not equal, in words; empty where all that both name is equal."""
    changed = {what: value for what, value in found.items() if recorded.get(what, value) != value}
    return ", ".join(f"{what} (was {recorded[what]}, is {value})" for what, value in changed.items())


def warn_unchecked(what: str) -> None:
    """One line about a record of an earlier version, which does not say what it belongs to."""
    _log.warning("%s was written by an earlier version and does not say what it was made from: not checked", what)


def _canonical(config: Mapping[str, Any]) -> str:
    return json.dumps({k: v for k, v in config.items() if k not in _NO_OUTPUT}, sort_keys=True, default=str)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
