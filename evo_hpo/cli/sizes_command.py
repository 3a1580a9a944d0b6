"""``evo-hpo sizes``: what files a plan's levels make, and what serving them takes, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from evo_hpo.cli.options import console
from evo_hpo.errors import PlanError
from evo_hpo.space.amounts import Amount, milliseconds, shown
from evo_hpo.space.ranges import each


def sizes(
    plan: Annotated[Path, typer.Argument(help="A plan (.toml), or a profile (.json) of a comparison.")],
    context: Annotated[int, typer.Option(min=0, help="Tokens a sequence of the key-value cache.")] = 8192,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences that are served at a time.")] = 1,
) -> None:
    """Say what it would take: bytes of the exported file at the lowest, highest and each uniform level.

    [bold]Example:[/bold] evo-hpo sizes my-plan.toml --context 32768
    """
    from evo_hpo.export.folder import task_of
    from evo_hpo.export.gguf_size import size_in_file
    from evo_hpo.scoring.expected_levels import expected_levels
    from evo_hpo.scoring.footprint import ModelShape, configuration
    from evo_hpo.scoring.latency_table import LatencyTable

    for key, entry in problems_of(plan):
        task = task_of({"problem": entry})
        levels = expected_levels(task)
        size, shape = size_in_file(task.model, levels), ModelShape.of(configuration(task.model))
        cache = 2 * shape.cached(context) * sequences
        table = Table(title=f"{key}: {size.weights:,} weights, {size.searched:,} searched")
        times = LatencyTable.read(task.latency_table) if task.latency_table else None
        if times:
            times.check_model(shape)
        columns = ["profile", "file", "bits a weight", "bytes a weight", f"with a cache of {sequences} x {context}"]
        for column in [*columns, "a token"] if times else columns:
            table.add_column(column, justify="left" if column == "profile" else "right")
        known = {name: assignment for name, _, assignment in size.rows(levels)}
        rows = [(name, taken) for name, taken, _ in size.rows(levels)]
        if "units" in entry:
            space = levels.counted_in("bytes").space(budget=10**15)
            known[plan.stem] = space.from_labels(entry["units"])
            rows.append((plan.stem, size.rest + space.cost(known[plan.stem])))
        asked = each(task.size, "size") if task.size else ()
        rows += [(f"asked: {one}", Amount.of(one).total(size.weights)) for one in asked]
        rows.append(("16 bits", 2 * size.weights))
        for name, taken in sorted(rows, key=lambda row: row[1]):
            cells = (shown(taken), f"{size.bits(taken):.3f}", f"{size.bits(taken) / 8:.4f}", shown(taken + cache))
            time = milliseconds(times.total(levels, known[name])) if times and name in known else ""
            table.add_row(name, *cells, *[time] * bool(times))
        console.print(table)
        if times:
            asked_time = f", asked: {task.latency}" if task.latency else ""
            console.print(f"a token: {times.place}{asked_time}", markup=False, highlight=False, soft_wrap=True)
        console.print(
            f"file: {shown(size.rest)} of each is what is not searched (embedding, head, norms, header), in 16 bits or"
            f" as in a GGUF template.\ncache: {shown(cache)} of keys and values in 16 bits; programs add buffers of"
            " their own.",
            markup=False,
        )


def problems_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Problems of a plan, or that of a profile with its ``units``."""
    if path.suffix == ".json":
        from evo_hpo.record.profiles import open_profile

        data, _ = open_profile(path)
        yield path.stem, {**data["problem"], "units": data["units"]}
        return
    from evo_hpo.run.plan_file import PlanFile

    problems = [p for p in PlanFile.read(path).plan().problems if "model" in p.settings or p.name == "smollm2"]
    if not problems:
        raise PlanError(f"{path} has no problem with a model: nothing is exported of it")
    for problem in problems:
        yield problem.key, {"name": problem.name, "settings": problem.settings}
