"""``evo-hpo latency``: measures how long a plan's layers take at each level, for budgets of milliseconds a token."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from evo_hpo.cli.options import console
from evo_hpo.cli.progress import BuildProgress
from evo_hpo.cli.sizes_command import problems_of
from evo_hpo.errors import InvalidSettingError, PlanError
from evo_hpo.space.amounts import milliseconds

if TYPE_CHECKING:
    from evo_hpo.export.latency import Program
    from evo_hpo.scoring.latency_table import LatencyTable


def latency(
    plan: Annotated[Path, typer.Argument(help="A plan (.toml) whose layers and levels are measured.")],
    output: Annotated[Path, typer.Argument(help="Table to write, for the plan's latency_table.")],
    program: Annotated[str, typer.Option(help="llama.cpp or torch.")] = "llama.cpp",
    threads: Annotated[int, typer.Option(min=1, help="Of the processor; as many as will serve.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, or cuda for torch.")] = "cpu",
    machine: Annotated[str, typer.Option(help="Its name in the table; default: what it calls itself.")] = "",
    depth: Annotated[int, typer.Option(min=0, help="Tokens of the text before the one that is timed.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Times that everything is run.")] = 60,
    profiles: Annotated[int, typer.Option(min=2, help="Random assignments that the table is checked on.")] = 10,
) -> None:
    """Measure how long a token takes in each layer at each level, and check the sums against whole models.

    [bold]Example:[/bold] evo-hpo latency my-plan.toml my-machine.json --threads 4
    """
    from evo_hpo.export.folder import task_of
    from evo_hpo.export.latency import measured
    from evo_hpo.files import write_whole
    from evo_hpo.models.paths import user_path, writable_folder
    from evo_hpo.record.environment import machine as this_machine
    from evo_hpo.scoring.expected_levels import expected_levels

    (key, entry), *others = problems_of(plan)
    output = user_path(output)
    if output.suffix != ".json" or output.exists():
        raise PlanError(f"{output} must be a new file that ends in .json")
    writable_folder(output.parent)
    task = task_of({"problem": entry})
    runs = _program(program, task.model, threads, device)
    name = machine or f"{platform.node()} ({this_machine()['processor']}, {this_machine()['cores']} cores)"
    levels = expected_levels(task)
    with BuildProgress("measure", console) as progress:
        table = measured(
            runs,
            task.model,
            levels,
            machine=name,
            threads=threads,
            depth=depth,
            rounds=rounds,
            profiles=profiles,
            progress=progress,
        )
    write_whole(output, table.text())
    _show(table, output, table.reach(levels))
    if others:
        names = ", ".join(name for name, _ in others)
        console.print(
            f"measured for {key}, the plan's first problem; others ({names}) of other layers, levels or models need"
            " tables of their own, from plans of their own",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _program(name: str, model: str, threads: int, device: str) -> Program:
    if name == "llama.cpp" and device == "cpu":
        from evo_hpo.export.llama_cpp_timing import LlamaCppProgram

        return LlamaCppProgram(model, threads)
    if name == "torch" and device in ("cpu", "cuda"):
        from evo_hpo.export.torch_timing import TorchProgram

        return TorchProgram(model, threads, device)
    raise InvalidSettingError(
        f"--program {name} --device {device}: measured are llama.cpp on cpu, torch on cpu or cuda"
    )


def _show(table: LatencyTable, path: Path, reach: tuple[int, int]) -> None:
    shapes = list(dict.fromkeys((rows, columns) for rows, columns, _ in table.times))
    levels = list(dict.fromkeys(label for *_, label in table.times))
    shown = Table(title=f"microseconds a token, {table.place}")
    for column in ("level", *(f"{rows}x{columns}" for rows, columns in shapes)):
        shown.add_column(column, justify="left" if column == "level" else "right")
    for label in levels:
        times = [table.times.get((rows, columns, label)) for rows, columns in shapes]
        shown.add_row(label, *("" if time is None else f"{time / 1000:.1f}" for time in times))
    console.print(shown)
    checked = table.checked
    apart = max(abs(row["predicted"] / row["measured"] - 1) for row in checked["references"])
    console.print(
        f"attention, norms, embedding and head: {table.rest / 1e6:.3f} ms a token, after {table.depth} others;"
        f" the {len(checked['references'])} models that tell it are {100 * apart:.1f} % off at most\n"
        f"{len(checked['profiles'])} whole models of random levels: rank correlation {checked['rank_correlation']:.3f},"
        f" error {100 * checked['mean_error']:.1f} % on average, {100 * checked['largest_error']:.1f} % at most\n"
        f"the plan's levels take {milliseconds(reach[0])} to {milliseconds(reach[1])} a token; between the two, say:"
        f' latency = "{sum(reach) / 2e6:.4g} ms" and latency_table = "{path}" in the plan',
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
