"""A profile as packed integer weights in the format compressed-tensors, which vLLM and transformers load.

Layers of one bit-width are a group of the configuration, by their names. A weight is scale * (code - zero); codes lie
in 32-bit words, a row after another, the first in the lowest bits. What is not quantized is dense, zeros included:
the format has no sparse weights any more. The package itself (extra `compressed-tensors`) is needed to load a folder
back, not to write one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from evo_hpo.errors import ModelError, PlanError
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.levels.packing import Encoded, PackedQuantized, unpack_bits
from evo_hpo.levels.serving import SERVERS
from evo_hpo.models.identity import digest
from evo_hpo.models.loading import LoadedModel
from evo_hpo.models.structure import is_linear


def refuse_unservable(profile: Path, levels: LevelSet, assignment: Sequence[int], serve: str) -> None:
    """Raises PlanError where a profile cannot be served from this format, with the reason.

    Args:
        serve: what the profile was searched for; empty: whatever can.
    """
    if serve and SERVERS[serve].format != "compressed-tensors":
        raise PlanError(f"{profile} was searched for {serve}, which loads no packed weights: name a FILE.gguf to make")
    chosen = levels.chosen(assignment)
    names = [serve] if serve else [name for name, s in SERVERS.items() if s.format == "compressed-tensors"]
    reasons = [SERVERS[name].refusal(chosen) for name in names]
    if all(reasons):
        raise PlanError(
            f"{profile} cannot be served: {reasons[0]}; search with serve = 'vllm' or 'transformers' in the plan, or"
            " export dense weights with --format dense"
        )


def write_packed(folder: Path, loaded: LoadedModel, encoded: Mapping[str, Encoded]) -> dict[int, int]:
    """Rewrites a folder of dense weights: those that have codes are packed, and the configuration says how.

    Args:
        folder: written by ``save_pretrained`` with the decoded weights of the same levels.
        loaded: the model, for names and dtype.
        encoded: module -> its level as it is stored.

    Returns:
        Bits -> how many modules have them.

    Raises:
        ModelError: groups of columns that the format cannot say, scales that half precision cannot hold, or a module's
            weights are not in the folder.
    """
    packed = {name: level for name, level in encoded.items() if isinstance(level, PackedQuantized)}
    for name, level in packed.items():
        if level.group_of is not None:
            raise ModelError(f"{name!r}: its groups do not follow its columns: build with static_groups = true")
    dtype = next(p.dtype for p in loaded.model.parameters() if p.is_floating_point())
    for name, level in packed.items():
        _refuse_small(name, level, dtype)
    wanted: dict[str, list[str]] = {}  # several, where layers are copies of each other
    for name, level in packed.items():
        wanted.setdefault(_content(level.decode(dtype)), []).append(name)
    groups: dict[tuple[int, bool, int], list[str]] = {}
    dense = []
    for path in sorted(folder.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        for key, tensor in load_file(path).items():
            names = wanted.get(_content(tensor), []) if tensor.dim() == 2 else []
            module = key.removesuffix(".weight")
            if not names:
                tensors[key] = tensor
                dense.append(module)
                continue
            name = names.pop(names.index(module) if module in names else 0)
            level = packed[name]
            tensors |= {f"{module}.{part}": value for part, value in _tensors(level, dtype).items()}
            size = 0 if level.group_size >= level.shape[1] else level.group_size
            scheme = (level.bits, level.zero is None, size)
            groups.setdefault(scheme, []).extend(dict.fromkeys((module, name)))
        save_file(tensors, path, {"format": "pt"})
    if lost := [name for names in wanted.values() for name in names]:
        raise ModelError(f"the weights of {lost[0]!r} are not in the folder that was written")
    rewrite_index(folder)
    linear = [n for n, m in loaded.model.named_modules() if is_linear(m) and n not in packed]
    ignored = sorted({*linear, "lm_head", *(n for n in dense if n.rpartition(".")[2] in _last(groups))})
    _configure(folder, groups, ignored)
    return dict(sorted(Counter(level.bits for level in packed.values()).items()))


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (rows x columns, uint8) in 32-bit words, each row by itself: rows x ceil(columns * bits / 32), int32."""
    planes = (codes.numpy()[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    flat = planes.reshape(len(codes), -1).astype(np.uint8)
    padded = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view("<i4").astype(np.int32, copy=True))


def _tensors(level: PackedQuantized, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the format stores of a module; scales in single precision where the model is, else in half."""
    rows, columns = level.shape
    codes = unpack_bits(level.codes, level.bits, rows * columns).view(rows, columns)
    found = {
        "weight_packed": pack_words(codes, level.bits),
        "weight_scale": _scale(level).to(_scale_dtype(dtype)).contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if level.zero is not None:
        found["weight_zero_point"] = pack_words(level.zero.T.contiguous(), level.bits).T.contiguous()
    return found


def _scale(level: PackedQuantized) -> torch.Tensor:
    return level.scale.float() * 2.0**level.exponent


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float32 else torch.float16


def _refuse_small(name: str, level: PackedQuantized, dtype: torch.dtype) -> None:
    """Raises ModelError where scales are lost: the format has no exponent beside them, as the store has."""
    scale = _scale(level)
    lost = (scale.to(_scale_dtype(dtype)).double() - scale.double()).square().sum()
    if not lost <= _ROUNDING * scale.double().square().sum():
        raise ModelError(
            f"{name!r} has scales of {float(scale.min()):.2g} to {float(scale.max()):.2g}, which half precision does"
            " not hold: give --dtype float32, in which scales are in single precision"
        )


_ROUNDING = 1e-6
"""Relative squared error of scales above which weights are others: half precision itself brings none about."""


def _configure(folder: Path, groups: Mapping[tuple[int, bool, int], Sequence[str]], ignored: Sequence[str]) -> None:
    """Writes the groups (bits, symmetric, columns a scale or 0 for a row -> modules) into the configuration."""
    found: dict[str, Any] = {}
    for (bits, symmetric, size), names in sorted(groups.items()):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group" if size else "channel",
            "group_size": size or None,
            "dynamic": False,
        }
        name = f"bits_{bits}{'' if symmetric else '_zero_points'}_{size or 'channel'}"
        found[name] = {"targets": list(names), "weights": weights, "format": "pack-quantized"}
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": found,
        "ignore": list(ignored),
    }
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def rewrite_index(folder: Path) -> None:
    """Says again which tensor lies in which of several files."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return
    index = json.loads(path.read_text(encoding="utf-8"))
    files = {file: load_file(folder / file) for file in sorted(set(index["weight_map"].values()))}
    index["weight_map"] = {name: file for file, tensors in files.items() for name in tensors}
    index["metadata"]["total_size"] = sum(t.numel() * t.element_size() for f in files.values() for t in f.values())
    path.write_text(json.dumps(index, indent=2), encoding="utf-8")


def _last(groups: Mapping[Any, Sequence[str]]) -> set[str]:
    """Last parts of the names that are packed: the same parts of other blocks are layers that are not."""
    return {name.rpartition(".")[2] for names in groups.values() for name in names}


def _content(weight: torch.Tensor) -> str:
    """Hash of a matrix: checkpoints may call a module otherwise than the model does."""
    data = weight.detach().cpu().contiguous()
    return digest([str(tuple(data.shape)), data.reshape(-1).view(torch.uint8).numpy().tobytes()])
