"""``evo-hpo plan-memory``: what a search needs of a device, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from evo_hpo.cli.options import console
from evo_hpo.errors import InvalidSettingError
from evo_hpo.space.amounts import Amount

if TYPE_CHECKING:
    from evo_hpo.scoring.footprint import Footprint


def plan_memory(
    model: Annotated[
        list[str] | None, typer.Argument(help="Folders, hub ids, or 1B, 8B, 70B: shapes of Llama 3. Default: these.")
    ] = None,
    levels: Annotated[
        str, typer.Option(help="Bits, ggml types, or sparsities, separated by commas. Default: the method's.")
    ] = "",
    method: Annotated[str, typer.Option(help="gptq, ggml, rtn, sparsegpt, magnitude, wanda or drop.")] = "gptq",
    device: Annotated[str, typer.Option(help="Memory of one device, such as '80 GB'.")] = "80 GB",
    context: Annotated[int, typer.Option(min=0, help="Tokens of a key-value cache, for the last column.")] = 8192,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 2048,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Pool that minibatches are drawn from.")] = 524_288,
    held_out_tokens: Annotated[int, typer.Option(min=1, help="Held-out text.")] = 131_072,
    group_size: Annotated[int, typer.Option(min=1, help="Weights that share a scale.")] = 128,
    cpu: Annotated[int, typer.Option(min=0, help="So many cores of a CPU score; 0: a GPU.")] = 0,
) -> None:
    """Say what a search needs of a device's memory, from the model's configuration alone.

    [bold]Example:[/bold] evo-hpo plan-memory 8B --levels 2,3,4 --device "24 GB"
    """
    from evo_hpo.scoring.footprint import TYPICAL, ModelShape, configuration, footprint
    from evo_hpo.scoring.placement import KINDS

    room, (labels, wanted) = Amount.of(device, "device", relative=False).total(0), _levels(method, levels)
    kinds = KINDS if wanted else KINDS[:1]  # what is dropped is neither packed nor brought
    what = " ".join(filter(None, (method, ",".join(labels))))
    table = Table(title=f"memory of a search in 16 bits, {what}; device: {device}")
    for column in ("model", "weights", "levels", "uncompressed", "inputs", "a pass", "in all", f"{device} device"):
        table.add_column(column, justify="left" if column in ("model", f"{device} device") else "right")
    table.add_column(f"cache of {context}", justify="right")
    for name in model or list(TYPICAL):
        shape = ModelShape.of(configuration(name))
        given: dict[str, Any] = {
            "method": method,
            "group_size": group_size,
            "sequence_length": sequence_length,
            "calibration_tokens": calibration_tokens,
            "held_out_tokens": held_out_tokens,
            "on_cpu": cpu > 0,
            "replicas": max(1, cpu),
        }
        needs = {str(kind): footprint(shape, wanted, memory=str(kind), **given) for kind in kinds}
        fits = {kind: one.total <= room for kind, one in needs.items()}
        for kind, one in needs.items():
            cells = [f"{size / 1e9:.1f}" for _, size in one.rows()]
            cache = f"{2 * shape.cached(context) / 1e9:.1f}"
            table.add_row(f"{name}, {kind}", *cells, f"{one.total / 1e9:.1f}", _verdict(kind, one, fits, room), cache)
    console.print(table)
    if cpu:
        console.print("Of the process: a pass includes 0.4 GB for Python and libraries.")
    console.print(
        "GB, counted from the configuration; a key-value cache is what serving needs on top of the compressed model.\n"
        'resident: every level decoded. packed (memory = "packed"): as on disk, decoded when they are switched to.\n'
        'streamed (memory = "streamed"): model and packed levels wait in main memory, blocks come for their turn.\n'
        'Several devices of one machine: devices = ["cuda:0", "cuda:1"]; in equal parts, but for the largest layers.',
        markup=False,
    )


def _verdict(kind: str, needs: Footprint, fits: Mapping[str, bool], room: int) -> str:
    """Whether a model fits so on one device, or what it needs instead."""
    if fits[kind]:
        return "fits"
    if kind == "resident" and fits.get("packed"):
        return "needs packed levels"
    if kind == "streamed":
        return "does not fit"
    streamed = ", or streamed" if fits.get("streamed") else ""
    return f"needs {-(-needs.total // room)} devices{streamed}"


def _levels(method: str, text: str) -> tuple[list[str], list[float]]:
    """Levels of a method, by default its own: labels, and bits or sparsities."""
    from evo_hpo.levels.build import make_compressor
    from evo_hpo.levels.ggml import row_bytes
    from evo_hpo.scoring.footprint import SPARSE

    if method == "drop":
        if text:
            raise InvalidSettingError(f"levels={text!r}: modules are dropped or kept, leave levels out")
        return [], []
    given = [part.strip() for part in text.split(",")] if text else None
    found: Any = make_compressor(method, given, {})
    if method in SPARSE:
        return list(found.labels), [float(level.share) for level in found.levels]
    bits = [row_bytes(kind, 256) / 32 for kind in found.labels] if method == "ggml" else found.bits
    return list(found.labels), list(bits)
