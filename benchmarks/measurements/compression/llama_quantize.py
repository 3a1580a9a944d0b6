"""What llama.cpp's own program llama-quantize makes of a model, against what is made here (extra `gguf`).

python -m benchmarks.measurements.compression.llama_quantize importance MODEL imatrix.gguf [--tokens 32768]
llama-quantize --allow-requantize --imatrix imatrix.gguf MODEL.gguf THEIRS.gguf Q3_K_M
python -m benchmarks.measurements.compression.llama_quantize compare OURS.gguf THEIRS.gguf
python -m benchmarks.measurements.compression.llama_quantize types THEIRS.gguf ...

`importance` writes the weights of columns that a store of ggml types is built with as the importance matrix that
llama-quantize reads. `compare` tells which tensors differ, in type or blocks; `types` prints each file's types.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter

from evo_hpo.errors import ModelError
from evo_hpo.export.gguf_header import architecture_of
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.compressor import CompressedLevel, Inputs
from evo_hpo.levels.ggml import tensor_names
from evo_hpo.levels.quantizers import Ggml, importance
from evo_hpo.models.loading import LoadedModel, load_model
from evo_hpo.models.structure import decoder_blocks
from evo_hpo.models.text import load_tokens


class _Recorder(Ggml):
    """Keeps what columns are weighted with, layer after layer."""

    def __init__(self) -> None:
        super().__init__(["F16"])
        self.seen: list[torch.Tensor] = []

    def compress(self, weight: torch.Tensor, inputs: Inputs) -> list[CompressedLevel]:
        self.seen.append(importance(inputs))
        return super().compress(weight, inputs)


def importance_matrix(loaded: LoadedModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Layer -> the weight of each column (float32), as a store that is built on these tokens has it."""
    recorder = _Recorder()
    with tempfile.TemporaryDirectory() as folder:
        manifest = build_store(loaded, Path(folder) / "store", recorder, tokens, inputs="dense")
    return dict(zip((unit.name for unit in manifest.units), recorder.seen, strict=True))


def write_importance(path: Path, loaded: LoadedModel, weights: Mapping[str, torch.Tensor], text: str) -> None:
    """An importance matrix file of llama.cpp: sums of squares, here of one token that has the mean squares.

    Raises:
        ModelError: a layer has no name of its own in llama.cpp, as single experts have not.
    """
    config: Any = loaded.model.config
    named = tensor_names(architecture_of(config).name, len(decoder_blocks(loaded.model)))
    names = {layer: named(f"{layer}.weight") for layer in weights}
    shared = Counter(names.values())
    for layer, name in names.items():
        if name is None or shared[name] > 1:
            raise ModelError(f"{layer!r} has no name of its own in llama.cpp: its importance cannot be written")
    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    for layer, weight in weights.items():
        writer.add_tensor(f"{names[layer]}.in_sum2", weight.numpy()[None])
        writer.add_tensor(f"{names[layer]}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def differences(ours: Path, theirs: Path) -> dict[str, str]:
    """Tensor -> how it differs between two files; those that are equal to the byte are left out."""
    first, second = ({tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in (ours, theirs))
    found = dict.fromkeys(first.keys() ^ second.keys(), "in one file only")
    for name in first.keys() & second.keys():
        one, other = first[name], second[name]
        if one.tensor_type != other.tensor_type or one.n_elements != other.n_elements:
            found[name] = " and ".join(f"{t.n_elements} weights in {t.tensor_type.name}" for t in (one, other))
            continue
        blocks = int(one.n_elements) // int(gguf.GGML_QUANT_SIZES[one.tensor_type][0])
        unequal = (one.data.view(np.uint8).reshape(blocks, -1) != other.data.view(np.uint8).reshape(blocks, -1)).any(1)
        if unequal.any():
            found[name] = f"{int(unequal.sum())} of {blocks} blocks of {one.tensor_type.name}"
    return found


def types(path: Path) -> dict[str, dict[str, str]]:
    """Role (`attn_q`, `token_embd`, ...) -> type -> the blocks where a file has it, as `0-2,5`; of matrices only."""
    found: dict[str, dict[str, list[int]]] = {}
    for tensor in GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            _, block, role = ("", "0", *tensor.name.split("."))[-4:-1]
            found.setdefault(role, {}).setdefault(tensor.tensor_type.name, []).append(int(block))
    return {role: {kind: _ranges(sorted(blocks)) for kind, blocks in of.items()} for role, of in found.items()}


def _ranges(numbers: list[int]) -> str:
    firsts = [n for n in numbers if n - 1 not in numbers]
    lasts = [n for n in numbers if n + 1 not in numbers]
    return ",".join(f"{a}-{z}" if a < z else f"{a}" for a, z in zip(firsts, lasts, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    written = commands.add_parser("importance")
    written.add_argument("model")
    written.add_argument("output", type=Path)
    written.add_argument("--text", default="pydoc")
    written.add_argument("--tokens", type=int, default=32768)
    compared = commands.add_parser("compare")
    compared.add_argument("ours", type=Path)
    compared.add_argument("theirs", type=Path)
    listed = commands.add_parser("types")
    listed.add_argument("files", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "importance":
        loaded = load_model(arguments.model, torch.float32)
        tokens = load_tokens(arguments.text, loaded.tokenizer, 512, arguments.tokens, 0, model=loaded.model)
        write_importance(arguments.output, loaded, importance_matrix(loaded, tokens), arguments.text)
    elif arguments.command == "compare":
        found = differences(arguments.ours, arguments.theirs)
        print("\n".join(f"{name}: {how}" for name, how in sorted(found.items())) or "every tensor is equal to the byte")
    else:
        print(",\n".join(f'"{path.stem}": {json.dumps(types(path))}' for path in arguments.files))


if __name__ == "__main__":
    main()
