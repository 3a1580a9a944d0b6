"""What a GGUF file will take, before it is written."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from evo_hpo.export.gguf_header import architecture_of, write_header
from evo_hpo.export.gguf_tensors import plain_type
from evo_hpo.levels.ggml import row_bytes, tensor_names
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.models.experts import unfuse_experts
from evo_hpo.models.loading import load_tokenizer, source_gguf
from evo_hpo.models.structure import decoder_blocks
from evo_hpo.scoring.file_size import FileSize, is_gguf
from evo_hpo.scoring.footprint import configuration, empty_model


def size_in_file(model: str, levels: LevelSet) -> FileSize:
    """As :meth:`FileSize.of`, and of a GGUF file without a template: header and all that is not searched counted.

    Blocks that are dropped as a whole are counted, though they leave the file.

    Raises:
        ModelError: no GGUF file can be written of the model. Others: as :meth:`FileSize.of`.
    """
    if not is_gguf(levels) or source_gguf(model):
        return FileSize.of(model, levels)
    config = configuration(model)
    empty = empty_model(config)
    weights = sum({id(p): p.numel() for p in empty.parameters()}.values())
    unfuse_experts(empty)
    blocks, architecture = len(decoder_blocks(empty)), architecture_of(config).name
    named = tensor_names(architecture, blocks)
    units = levels.counted_in("bytes").units
    searched = {member for unit in units for member in unit.members}
    names: dict[str, int] = {}
    rest = 0
    for parameter_name, parameter in empty.named_parameters():
        name = named(parameter_name) or parameter_name
        names[name] = parameter.dim() + ("_exps." in name)
        if parameter_name.removesuffix(".weight") not in searched:
            columns = parameter.shape[-1]
            taken = row_bytes(plain_type(name, parameter.dim()), columns) * (parameter.numel() // columns)
            rest += -(-taken // 32) * 32
    header = _header(model, config, architecture, blocks)
    header += sum(24 + len(name) + 8 * dimensions for name, dimensions in names.items())
    return FileSize(weights, sum(unit.size for unit in units), rest + -(-header // 32) * 32)


def _header(model: str, config: Any, architecture: str, blocks: int) -> int:
    """Bytes of all that stands before the tensors' names."""
    writer = GGUFWriter(None, architecture)
    write_header(writer, config, load_tokenizer(model), blocks, model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.close()
        return path.stat().st_size
