"""One comparison as its user meets it: checked, prepared, run with progress and tracking, reported."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from evo_hpo.cli.progress import BuildProgress, ComparisonProgress, say
from evo_hpo.cli.unexpected import safe
from evo_hpo.errors import EvoHpoError
from evo_hpo.models.paths import writable_folder
from evo_hpo.record.comparison import Comparison
from evo_hpo.run.plan import Plan
from evo_hpo.run.preparing import prepare
from evo_hpo.run.schedule import ComparisonFailed, check_ray, compare, comparison_folder
from evo_hpo.tracking.location import database_path, default_uri, track_command, ui_command


def run(
    plan: Plan,
    console: Console,
    words: Sequence[str],
    text: str,
    *,
    root: Path,
    resume: bool = False,
    track: bool = True,
    tracking_uri: str | None = None,
    ray: str | None = None,
) -> Path:
    """Runs a plan, shows its table, and says where everything is.

    Args:
        words: what the user typed after ``evo-hpo``; on an interrupt, what resumes it is shown.
        text: the plan file's text, copied into the comparison's folder.

    Raises:
        EvoHpoError: bad input, before any work; or a search failed.
        KeyboardInterrupt: everything scored so far is in the journals and in MLflow.
    """
    command = shlex.join(["evo-hpo", *(w for w in words if w != "--resume"), "--resume"])
    plan.check()
    check_ray(ray)
    going_on = comparison_folder(plan, root, resume=True) if resume else None
    writable_folder(going_on or root)
    if track and (database := database_path(tracking_uri or default_uri(root))):
        writable_folder(database.parent)
    kept = "no search was started; the units that were built are kept, and the same command goes on from there"
    with safe(kept, KeyboardInterrupt), BuildProgress("", console) as bars:
        prepare(plan, lambda key, done, total, what: bars(done, total, what, key))
    folder = going_on or comparison_folder(plan, root, resume=False)
    writable_folder(folder)
    say(console, f"comparison: {folder}")
    try:
        with (
            safe(f"everything scored so far is in {folder}/journals, resume with: {command}"),
            _tracking(folder, tracking_uri, track),
            ComparisonProgress(plan, console) as progress_of_all,
        ):
            compare(plan, root=root, resume=resume, listener=progress_of_all, plan_text=text, folder=folder, ray=ray)
    except KeyboardInterrupt:
        tracked = "; MLflow has it too, except for what a message above names" if track else ""
        say(console, f"\ninterrupted: everything scored so far is in {folder}/journals{tracked}")
        say(console, f"resume with: {command}")
        raise
    except ComparisonFailed as error:
        error.args = (f"{error}; what is done is kept, resume with: {command}",)
        raise
    finally:
        console.show_cursor()
    reporting = shlex.join(["evo-hpo", "report", str(folder)])
    with safe(f"the searches are done and kept in {folder}, report them with: {reporting}"):
        show_report(folder, console)
        if track:
            _upload(folder, tracking_uri, console)
            say(console, f"browse the runs: {ui_command(folder, tracking_uri)}")
    return folder


@contextlib.contextmanager
def _tracking(folder: Path, tracking_uri: str | None, track: bool) -> Iterator[None]:
    if not track:
        yield
        return
    from evo_hpo.tracking import BackgroundTracker

    with BackgroundTracker(folder, tracking_uri):
        yield


def _upload(folder: Path, tracking_uri: str | None, console: Console) -> None:
    from evo_hpo.tracking import log_comparison

    try:
        log_comparison(folder, tracking_uri)
    except EvoHpoError as error:
        say(console, f"not in MLflow: {error}; repeat with: {track_command(folder, tracking_uri)}")


@contextlib.contextmanager
def _waiting(what: str, console: Console) -> Iterator[None]:
    """A bar that moves while something of unknown length goes on; a line where there is no terminal."""
    if not console.is_terminal:
        say(console, what)
        yield
        return
    columns = (TextColumn("{task.description}", style="bold"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield


def show_report(folder: Path, console: Console) -> None:
    """Writes the report of a comparison folder and prints its table and where the pictures are.

    Raises:
        PlanError: not a comparison's folder.
        InvalidSettingError: it cannot be written.
    """
    comparison = Comparison.read(folder)
    writable_folder(folder / "report")
    from evo_hpo.report import final_table, write_report
    from evo_hpo.report.results import Results

    with _waiting("report: statistics and pictures", console):
        results = Results.load(folder)
        page = write_report(results)
    console.print(final_table(results))
    names = sorted(p.name for p in page.parent.iterdir() if p.suffix == ".png")
    say(console, f"pictures: {page.parent}/ {' '.join(names)}")
    say(console, f"report: {page}")
    for path in comparison.winner_files():
        say(console, f"winning profile: {path}")
