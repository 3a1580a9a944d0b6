"""Commands that show what was found and what there is: ``evo-hpo report | track | ui | list``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evo_hpo.cli.options import UriOption, console


def report(
    folder: Annotated[Path, typer.Argument(help="A comparison's folder; finished or still running.")],
) -> None:
    """Write tables, pictures and the HTML report of a comparison, and print its table.

    [bold]Example:[/bold] evo-hpo report mlruns/comparisons/smollm2-3bit
    """
    from evo_hpo.cli.comparing import show_report

    show_report(folder, console)


def track(
    journal: Annotated[Path, typer.Argument(help="A comparison's folder or one journal (.jsonl).")],
    tracking_uri: UriOption = None,
) -> None:
    """Replay journals into MLflow; what is there already is not written again.

    [bold]Example:[/bold] evo-hpo track mlruns/comparisons/smollm2-3bit --tracking-uri http://127.0.0.1:5000
    """
    from evo_hpo.tracking import track as replay

    replay(journal, tracking_uri)
    console.print(f"{journal} is in MLflow", markup=False, highlight=False)


def ui(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
    tracking_uri: UriOption = None,
) -> None:
    """Open the MLflow UI on the tracked runs (loopback only).

    [bold]Example:[/bold] evo-hpo ui --port 5001
    """
    from evo_hpo.tracking import launch_ui

    launch_ui(tracking_uri, port)


def list_names(
    name: Annotated[str | None, typer.Argument(help="A searcher or problem: shows its settings.")] = None,
) -> None:
    """List searchers and problems, or the settings of one.

    [bold]Example:[/bold] evo-hpo list evopress
    """
    from evo_hpo.cli.listing import show_names, show_settings

    if name is None:
        show_names(console)
    else:
        show_settings(name, console)
