"""``evo-hpo evaluate``: models and profiles on texts and tasks, as a table and a picture."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from evo_hpo.cli.options import UriOption, console
from evo_hpo.cli.progress import say
from evo_hpo.cli.unexpected import safe
from evo_hpo.errors import EvoHpoError, InvalidSettingError
from evo_hpo.files import write_whole
from evo_hpo.models.paths import user_path, writable_folder
from evo_hpo.space.amounts import shown

if TYPE_CHECKING:
    from evo_hpo.export.evaluation import Evaluation


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Models (hub id, folder, FILE.gguf) and profiles (.json).")],
    text: Annotated[list[str] | None, typer.Option(help="Text, as in a plan; repeatable. Default: pydoc.")] = None,
    original: Annotated[str, typer.Option(help="Uncompressed model. Default: the first profile's.")] = "",
    sequence_length: Annotated[int, typer.Option(help="Tokens a sequence or window.")] = 2048,
    tokens: Annotated[int, typer.Option(help="Of each text, from its start.")] = 32768,
    stride: Annotated[int, typer.Option(help="New tokens a window; 0: sequences do not overlap.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    arithmetic: Annotated[str, typer.Option(help="llama.cpp: round inputs as it does. Default: the plan's.")] = "",
    tasks: Annotated[str, typer.Option(help="Of lm-evaluation-harness, separated by commas.")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="Task files of your own; only these are known then.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples a task.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of table and picture. Default: the comparison's.")] = None,
    track: Annotated[bool, typer.Option(help="Write what was measured to MLflow.")] = True,
    tracking_uri: UriOption = None,
) -> None:
    """Measure perplexity, KL to the original and tasks of several models, in one table.

    [bold]Example:[/bold] evo-hpo evaluate mlruns/comparisons/NAME/profiles/winner.json other.gguf --text wikitext2
    """
    from evo_hpo.export import evaluation
    from evo_hpo.export.harness_tasks import HarnessTasks
    from evo_hpo.models.loading import compute_dtype
    from evo_hpo.record.comparison import Comparison

    if (task_folder or limit is not None) and not tasks:
        raise InvalidSettingError(
            f"task_folder={str(task_folder or '')!r}, limit={limit} are of tasks: name them with --tasks"
        )
    wanted = HarnessTasks(tuple(name.strip() for name in tasks.split(",")), task_folder, limit) if tasks else None
    profiles = [Path(model) for model in models if model.endswith(".json")]
    known = [p.parent.parent for p in profiles if p.parent.name == "profiles" and Comparison.lies_in(p.parent.parent)]
    folder = user_path(output) if output else (known[0] if known else Path()) / "evaluation"
    finished: list[Evaluation] = []
    with _kept_if_filled(folder):
        try:
            found = evaluation.evaluate(
                models,
                text or ["pydoc"],
                original=original,
                sequence_length=sequence_length,
                tokens=tokens,
                stride=stride,
                dtype=compute_dtype(dtype),
                arithmetic=arithmetic,
                tasks=wanted,
                progress=lambda name: say(console, f"{name}: measuring"),
                finished=finished.append,
            )
        except EvoHpoError:
            if finished and finished[-1].results[-1].name != "original":
                _kept(finished[-1], folder)
            raise
        data, files = _kept(found, folder)
    for comparison in dict.fromkeys(known if track else []):
        from evo_hpo.tracking import log_evaluation

        try:
            log_evaluation(comparison, data, files, tracking_uri)
        except EvoHpoError as error:
            say(console, f"not in MLflow: {error}")


def _kept(found: Evaluation, folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Shows what was measured and writes table and picture of it."""
    from evo_hpo.report.size_plot import size_figure

    data = found.to_json()
    _show(data)
    table, picture = _free(folder)
    with safe("what was measured is in the table above"):
        write_whole(table, json.dumps(data, indent=1))
        size_figure(data["results"], list(found.identities)).savefig(picture, dpi=150)
    say(console, f"table and picture: {table} {picture}")
    return data, [table, picture]


def _free(folder: Path) -> tuple[Path, Path]:
    """Table and picture beside those of earlier evaluations, which stay: ``evaluation``, ``evaluation-2`` and so on."""
    for name in itertools.chain(["evaluation"], (f"evaluation-{number}" for number in itertools.count(2))):
        table, picture = folder / f"{name}.json", folder / f"{name}.png"
        if not table.exists() and not picture.exists():
            break
    return table, picture


@contextlib.contextmanager
def _kept_if_filled(folder: Path) -> Iterator[None]:
    """A folder that is there before the work, so that a place that cannot be is known then; gone if it stays empty."""
    writable_folder(folder)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def _show(data: dict[str, Any]) -> None:
    way = f"windows with {s} new tokens" if (s := data["protocol"]["stride"]) else "sequences that do not overlap"
    way += f"; {a}'s arithmetic" if (a := data["protocol"]["arithmetic"]) else ""
    table = Table(
        title=f"{data['protocol']['sequence_length']} tokens a sequence, {way}; {data['protocol']['interval']}"
    )
    for column in ("model", "file", "bits a weight"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for text in data["identities"]:
        for column in (f"{text}: perplexity", "above original", "KL, nats a token"):
            table.add_column(column, justify="right")
    names = list(dict.fromkeys(key for row in data["results"] for key in row["tasks"] if not key.endswith("_stderr")))
    for name in names:
        table.add_column(name, justify="right")
    for row in data["results"]:
        size = [shown(row["bytes"]), f"{8 * row['bytes'] / row['weights']:.3f}"] if row["bytes"] else ["?", "?"]
        cells = [row["name"], *size]
        for text in data["identities"]:
            figures = row["texts"][text]
            cells += [_estimate(figures["perplexity"]), _estimate(figures["above"], True), _estimate(figures["kl"])]
        table.add_row(*cells, *(f"{row['tasks'][n]:.4g}" if n in row["tasks"] else "" for n in names))
    console.print(table)
    length, asked = data["protocol"]["sequence_length"], data["protocol"]["tokens"]
    for text, read in data["read"].items():
        if read < asked // length * length:
            say(console, f"{text} has only {read:,} tokens in whole sequences of {length}, fewer than were asked for")


def _estimate(found: dict[str, float | None] | None, percent: bool = False) -> str:
    if found is None:
        return ""
    told = ["?" if v is None else f"{100 * v:+.2f}" if percent else f"{v:.4g}" for v in found.values()]
    return f"{told[0]}{' %' * percent} [{told[1]}, {told[2]}]"
