"""``evo-hpo plan-memory``: what a search needs of a device, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from evo_hpo.cli.options import console
from evo_hpo.errors import InvalidSettingError, UnknownNameError
from evo_hpo.space.amounts import Amount

if TYPE_CHECKING:
    from evo_hpo.scoring.footprint import Footprint


def plan_memory(
    model: Annotated[
        list[str] | None, typer.Argument(help="Folders, hub ids, or 1B, 8B, 70B: shapes of Llama 3. Default: these.")
    ] = None,
    levels: Annotated[str, typer.Option(help="Bits, or sparsities, separated by commas.")] = "2,3,4,5,6",
    method: Annotated[str, typer.Option(help="gptq, rtn, sparsegpt, magnitude, wanda or drop.")] = "gptq",
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
    from evo_hpo.levels.build import METHODS
    from evo_hpo.scoring.footprint import TYPICAL, ModelShape, configuration, footprint
    from evo_hpo.scoring.placement import KINDS

    if method not in METHODS:
        raise UnknownNameError(f"no compression method {method!r}: use one of {', '.join(METHODS)}")
    room, wanted = Amount.of(device, "device", relative=False).total(0), _levels(levels)
    table = Table(title=f"memory of a search in 16 bits, {method} {levels}; device: {device}")
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
        needs = {str(kind): footprint(shape, wanted, memory=str(kind), **given) for kind in KINDS}
        fits = {kind: one.total <= room for kind, one in needs.items()}
        for kind, one in needs.items():
            cells = [f"{size / 1e9:.1f}" for _, size in one.rows()]
            cache = f"{2 * context * shape.key_values / 1e9:.1f}"
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
    if kind == "resident" and fits["packed"]:
        return "needs packed levels"
    if kind == "streamed":
        return "does not fit"
    streamed = ", or streamed" if fits["streamed"] else ""
    return f"needs {-(-needs.total // room)} devices{streamed}"


def _levels(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= level <= 16 for level in found):
        raise InvalidSettingError(f"levels={text!r} must be numbers separated by commas, 0 to 16")
    return found
