"""Commands that search: ``evo-hpo compare | search | ablate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evo_hpo.cli.options import (
    DEFAULT_ROOT,
    DryRunOption,
    RayOption,
    RootOption,
    SetOption,
    TrackOption,
    UriOption,
    WorkersOption,
    console,
    parse_settings,
)
from evo_hpo.errors import PlanError

if TYPE_CHECKING:
    from evo_hpo.run.plan_file import PlanFile


def compare(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(help="TOML file; copy one from benchmarks/plans.")],
    resume: Annotated[bool, typer.Option(help="Go on with the newest comparison of this name.")] = False,
    workers: WorkersOption = None,
    ray: RayOption = None,
    root: RootOption = DEFAULT_ROOT,
    track: TrackOption = True,
    tracking_uri: UriOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Compare search algorithms on equal budgets.

    [bold]Example:[/bold] evo-hpo compare benchmarks/plans/smollm2-3bit.toml
    """
    from evo_hpo.run.plan_file import PlanFile

    file = PlanFile.read(plan)
    if dry_run:
        _forecast(file)
        return
    _run(context, file, root, resume, track, tracking_uri, workers, ray)


def _forecast(file: PlanFile) -> None:
    """Says what the plan in a file would take, with uniform compression among its searchers."""
    from evo_hpo.cli.dry_run import dry_run

    dry_run(file.plan().with_uniform(), console)


def _run(
    context: typer.Context,
    file: PlanFile,
    root: Path,
    resume: bool,
    track: bool,
    tracking_uri: str | None,
    workers: int | None = None,
    ray: str | None = None,
    *,
    uniform: bool = True,
) -> None:
    """Runs the plan in a file, with uniform compression among its searchers where it is to be the measure."""
    from evo_hpo.cli.comparing import run

    plan = file.plan(**({} if workers is None else {"workers": workers}))
    if uniform:
        plan = plan.with_uniform()
    words, text = context.obj, file.text
    run(plan, console, words, text, root=root, resume=resume, track=track, tracking_uri=tracking_uri, ray=ray)


def search(
    context: typer.Context,
    searcher: Annotated[str, typer.Argument(help="Name of a searcher, see `evo-hpo list`.")],
    problem: Annotated[str, typer.Option(help="Name of a problem, see `evo-hpo list`.")] = "smollm2",
    settings: SetOption = None,
    problem_settings: Annotated[
        list[str] | None, typer.Option("--problem-set", metavar="KEY=VALUE", help="A problem's setting; repeatable.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Budget in calibration tokens.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Budget in trials.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget in seconds of scoring.")] = None,
    seed: Annotated[int, typer.Option(help="Of the searcher and its minibatches.")] = 0,
    name: Annotated[str | None, typer.Option(help="Of the comparison folder; default: made of the above.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the newest search of this name.")] = False,
    root: RootOption = DEFAULT_ROOT,
    track: TrackOption = True,
    tracking_uri: UriOption = None,
) -> None:
    """Run one search algorithm on one problem.

    [bold]Example:[/bold] evo-hpo search evopress --problem additive --evaluations 800 --set offspring=32
    """
    from evo_hpo.run.plan import SAFE_NAME
    from evo_hpo.run.plan_file import PlanFile

    budget = {"tokens": tokens, "evaluations": evaluations, "seconds": seconds}
    data = {
        "name": name or SAFE_NAME.sub("-", f"{problem}-{searcher}-s{seed}"),
        "seeds": [seed],
        "budget": {k: v for k, v in budget.items() if v is not None},
        "problems": [{"name": problem, "settings": parse_settings(problem_settings)}],
        "searchers": [{"name": searcher, "settings": parse_settings(settings)}],
    }
    _run(context, PlanFile.of(data, "search"), root, resume, track, tracking_uri, uniform=False)


def ablate(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(help="TOML plan; its \\[ablation] table, or --vary, says what varies.")],
    vary: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2,...", help="A setting and its values; repeatable.")
    ] = None,
    searcher: Annotated[str | None, typer.Option(help="With --vary: whose settings; default: the first.")] = None,
    grid: Annotated[bool, typer.Option(help="With --vary: every combination.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with the newest ablation of this name.")] = False,
    workers: WorkersOption = None,
    root: RootOption = DEFAULT_ROOT,
    track: TrackOption = True,
    tracking_uri: UriOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Vary settings of one searcher, everything else equal; the plan's other searchers run beside its variants.

    With --vary the comparison is called NAME-ablation.

    [bold]Example:[/bold] evo-hpo ablate benchmarks/plans/suite.toml --searcher evopress --vary offspring=4,16,64
    """
    from evo_hpo.run.plan_file import PlanFile

    file = PlanFile.read(plan)
    if vary:
        base = file.plan()
        values: dict[str, list[Any]] = {}
        for key, text in (pair.partition("=")[::2] for pair in vary):
            values.setdefault(key, []).extend(_values(key, text))
        ablation = {"searcher": searcher or base.searchers[0].key, "vary": values, "grid": grid}
        file = file.varied(f"{base.name}-ablation", ablation)
    elif "ablation" not in file.data:
        raise PlanError(
            f"{plan} has no [ablation] table: add one, or give --vary, for example --vary offspring=4,16,64"
        )
    elif searcher is not None or grid:
        given = "--grid" if searcher is None else "--searcher"
        raise PlanError(f"{given} goes with --vary, and without it the plan's [ablation] table holds: say it there")
    if dry_run:
        _forecast(file)
        return
    _run(context, file, root, resume, track, tracking_uri, workers)


def _values(key: str, text: str) -> list[Any]:
    """Values of ``--vary``: a TOML list, or values separated by commas."""
    if not key or not text:
        raise PlanError("--vary must be KEY=V1,V2,..., for example offspring=4,16,64")
    if text.startswith("["):
        values = parse_settings([f"values={text}"])["values"]
        if not isinstance(values, list):
            raise PlanError(f'--vary {key}={text} is no TOML list: write {key}=a,b, or {key}=["a", "b"] in quotes')
        return values
    return [parse_settings([f"value={v}"])["value"] for v in text.split(",")]
