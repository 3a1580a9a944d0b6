"""The command line: ``evo-hpo`` and its commands, in the order of the list below.

Bad input ends with one line on standard error and exit code 2; an interrupt with 130 and the command that resumes; what
nobody expected with 1, one line, and where its trace is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, cast

import typer

from evo_hpo.cli.evaluate_command import evaluate
from evo_hpo.cli.latency_command import latency
from evo_hpo.cli.memory_command import plan_memory
from evo_hpo.cli.model_commands import build, export
from evo_hpo.cli.options import console, errors
from evo_hpo.cli.pick_command import pick
from evo_hpo.cli.result_commands import list_names, report, track, ui
from evo_hpo.cli.search_commands import ablate, compare, search
from evo_hpo.cli.sizes_command import sizes
from evo_hpo.cli.streams import usable_streams
from evo_hpo.cli.unexpected import unexpected
from evo_hpo.errors import EvoHpoError

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
        sys.exit(getattr(error, "exit_code", 2))
    except (KeyboardInterrupt, typer.Abort) as error:
        text = "; ".join(["interrupted", *getattr(error, "__notes__", [])])
        errors.print(text, style="bold", markup=False, highlight=False, soft_wrap=True)
        sys.exit(130)
    except Exception as error:
        _say_error(unexpected(error))
        code = 1
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


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"evo-hpo {version('evo-hpo')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Its version.")] = False,
) -> None:
    pass


for command in (compare, search, ablate, build, report, track, ui, pick, export, evaluate, sizes, latency):
    app.command()(command)
app.command("plan-memory")(plan_memory)
app.command("list")(list_names)


if __name__ == "__main__":
    main()
