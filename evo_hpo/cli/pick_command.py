"""``evo-hpo pick``: a point of a front as a profile."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evo_hpo.cli.options import console
from evo_hpo.errors import PlanError

if TYPE_CHECKING:
    from evo_hpo.record.comparison import Comparison, PlannedSearch
    from evo_hpo.record.records import SearchRecord
    from evo_hpo.search.checkpoint import FrontPoint
    from evo_hpo.space.compression_space import CompressionSpace


def pick(
    comparison: Annotated[Path, typer.Argument(help="Folder of a comparison whose plan has a range of budgets.")],
    output: Annotated[Path | None, typer.Argument(help="Profile to write; default: under the comparison's.")] = None,
    average: Annotated[
        str | None, typer.Option(help="As in the plan: bits a weight, share of weights removed, or modules dropped.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="A file of at most this size, such as '90 MB'.")] = None,
    searcher: Annotated[str | None, typer.Option(help="Whose front; default: the one of least mean loss.")] = None,
    problem: Annotated[str | None, typer.Option(help="Which problem, where the plan has several.")] = None,
) -> None:
    """Take a point of a front: the dearest assignment within a budget, as a profile for `evo-hpo export`.

    [bold]Example:[/bold] evo-hpo pick mlruns/comparisons/smollm2-front --average 3.2 my-profile.json
    """
    from evo_hpo.files import write_whole
    from evo_hpo.models.paths import made_folder, user_path
    from evo_hpo.record.comparison import Comparison
    from evo_hpo.space.amounts import shown

    if (average is None) == (size is None):
        raise PlanError("give --average or --size, one of them: the budget of the point")
    found = Comparison.read(comparison)
    planned, record = _front(found, searcher, problem)
    points = record.checkpoints[-1].front
    space = found.problems[planned.problem].space
    if average is not None:
        amounts, asked = [p.cost for p in points], _within(space, _number(average))
        unit, told = _plain(space)
        ends = [f"{told(amount):.4g}" for amount in (amounts[0], amounts[-1])]
    else:
        amounts, asked = _file_sizes(found.profile(planned, record), points, found, planned, size or "")
        unit, ends = "file", [shown(min(amounts)), shown(max(amounts))]
    fitting = [p for p, amount in zip(points, amounts, strict=True) if amount <= asked]
    if not fitting:
        raise PlanError(
            f"nothing on the front of {planned.label} fits {average or size}:"
            f" give from {ends[0]} to {ends[1]}{'' if size else ' ' + unit}"
        )
    point = fitting[-1]
    profile = found.profile(planned, record, point)
    taken = amounts[points.index(point)]
    name = f"picked-{re.sub('[^0-9A-Za-z.]', '', average or size or '')}.json"
    path = user_path(output) if output else found.folder / "profiles" / name
    if path.suffix != ".json":
        raise PlanError(f"{path} must end in .json: it is a profile")
    if output is not None and path.exists():
        raise PlanError(f"{path} exists already: name another")
    if path.exists() and (other := _search_of(path)) != planned.id:
        raise PlanError(f"{path} is of {other}: name another file for what is of {planned.id}")
    made_folder(path.parent)
    write_whole(path, json.dumps(profile, indent=1))
    what = f"a file of {shown(taken)}" if size else f"{told(taken):.4g} {unit}"
    console.print(
        f"{path}: {what}, held-out loss {profile['held_out']['loss']:.4g}, of {planned.id}; export it with:"
        f" evo-hpo export {shlex.quote(str(path))} MODEL",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _search_of(path: Path) -> str:
    """Which search a profile says that it is of."""
    try:
        return str(json.loads(path.read_bytes())["search"])
    except (ValueError, KeyError, TypeError):
        return "no search that can be read"


def _front(found: Comparison, searcher: str | None, problem: str | None) -> tuple[PlannedSearch, SearchRecord]:
    """The search whose front is taken: of least mean loss over all budgets on the first held-out text."""
    from evo_hpo.record.comparison import winner
    from evo_hpo.record.fronts import judged
    from evo_hpo.record.records import SearchRecord

    pairs = [(p, r) for p, r in found.journals() if isinstance(r, SearchRecord) and _has_front(r)]
    keys = list(dict.fromkeys(p.problem for p, _ in pairs))
    if not pairs:
        raise PlanError(f"{found.folder} has no front: its plan has no range of budgets, or no search has ended")
    if problem is None and len(keys) > 1:
        raise PlanError(f"{found.folder} has fronts of {len(keys)} problems: give --problem, one of {', '.join(keys)}")
    key = problem or keys[0]
    if key not in keys:
        raise PlanError(f"no front of a problem {key!r}; there are: {', '.join(keys)}")
    own = [(p, r) for p, r in pairs if p.problem == key]
    records = judged({key: found.problems[key]}, [r for _, r in own])[1]
    labels = list(dict.fromkeys(p.label for p, _ in own))
    if searcher is not None and searcher not in labels:
        raise PlanError(f"no front of a searcher {searcher!r}; there are: {', '.join(labels)}")
    best = winner(r for r in records if searcher in (None, r.label))
    assert best is not None
    return next((p, r) for p, r in own if r.search == best.search)


def _has_front(record: SearchRecord) -> bool:
    return bool(record.checkpoints and record.checkpoints[-1].front)


def _plain(space: CompressionSpace) -> tuple[str, Callable[[int], float]]:
    """What a plan's average counts in this space, and that of a cost."""
    if space.resources[0] == "modules":
        return "modules dropped", lambda cost: len(space) - cost
    if space.resources[0] == "weights":
        return "of the weights removed", lambda cost: 1 - cost / space.total_size
    return f"{space.resources[0]} a weight", lambda cost: cost / space.total_size


def _within(space: CompressionSpace, average: Fraction) -> int:
    """The most that an assignment of a plan's average may cost; each layer rounds how many weights it keeps."""
    if space.resources[0] == "modules":
        return math.floor(len(space) - average)
    if space.resources[0] == "weights":
        return math.floor((1 - average) * space.total_size) + len(space) // 2
    return math.floor(average * space.total_size)


def _number(text: str) -> Fraction:
    try:
        if "e" in text.lower() and not math.isfinite(float(text)):  # a fraction of a billion digits takes for ever
            raise ValueError
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise PlanError(f"--average {text!r} must be a number, such as 3.2") from None


def _file_sizes(
    profile: dict[str, Any], points: Sequence[FrontPoint], found: Comparison, planned: PlannedSearch, size: str
) -> tuple[list[int], int]:
    """Bytes of the exported file of each point, and what was asked for."""
    from evo_hpo.export.folder import task_of
    from evo_hpo.export.gguf_size import size_in_file
    from evo_hpo.space.amounts import Amount

    asked = Amount.of(size, "--size")
    task = task_of(profile)
    levels = task.open_levels(where="cpu")
    file, bytes_of = size_in_file(task.model, levels), levels.counted_in("bytes").space(budget=10**15)
    space = found.problems[planned.problem].space
    taken = [file.rest + bytes_of.cost(bytes_of.from_labels(space.labels(p.levels))) for p in points]
    return taken, asked.total(file.weights)
