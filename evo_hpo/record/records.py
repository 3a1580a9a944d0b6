"""Reading journals: the lines of one search as values. :mod:`evo_hpo.record.journal` writes them.

A journal is a text file of JSON lines: a ``header``, then ``outcome`` and ``checkpoint`` lines in the order in which
they happened, then an ``end`` line when the search ended by itself. The lines of one scored batch are one durable
write; every one but the last says in ``more`` how many follow. A batch that is not whole, and a torn last line, do not
exist for any reader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from evo_hpo.errors import JournalError
from evo_hpo.record.lines import decode_checkpoint, decode_levels, decode_outcome, decode_probe
from evo_hpo.search.loop import Checkpoint
from evo_hpo.search.trial import Measured, Outcome
from evo_hpo.space.compression_space import Assignment, CompressionSpace

FORMAT = 1


class JournalTail:
    """Reads a journal that may still grow; each :meth:`poll` gives the whole lines that are new.

    Attributes:
        path: the file.
        position: bytes read and handed out so far; always the end of a whole batch.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.position = 0

    def poll(self) -> list[dict[str, Any]]:
        """New lines; a torn last line and an unfinished batch wait for the next call. No file: no lines.

        Raises:
            JournalError: a line in the middle is no JSON object.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                data = file.read()
        except FileNotFoundError:
            return []
        lines: list[dict[str, Any]] = []
        whole = at = used = 0
        while (end := data.find(b"\n", at)) >= 0:
            line = self._parse(data[at:end], self.position + at, last=end + 1 == len(data))
            if line is None:
                break
            at = end + 1
            lines.append(line)
            if not line.get("more"):
                whole, used = len(lines), at
        self.position += used
        return lines[:whole]

    def _parse(self, text: bytes, position: int, *, last: bool) -> dict[str, Any] | None:
        try:
            line = json.loads(text)
            if isinstance(line, dict) and "kind" in line:
                return line
        except ValueError:
            pass
        if last:
            return None
        raise JournalError(
            f"{self.path}: the line at byte {position} is damaged ({text[:40]!r}...): only a last line may be"
            " torn; restore the file or cut it at that byte and resume"
        )


@dataclass
class SearchRecord:
    """One search as its journal tells it.

    Attributes:
        path: the journal.
        header: what was searched, with what, on what; see :func:`evo_hpo.record.journal.search_header`.
        outcomes: every trial that was paid for, in order.
        times: seconds since the epoch at which each outcome was written.
        batches: size of each scored batch, in order.
        probes: sensitivities that were paid for, each with the number of outcomes before it.
        checkpoints: held-out figures along the budget.
        end: the end line (``stop_reason``, ``best``, ``best_loss``, ``seconds``, ``searcher_seconds``); None: the
            search is running or was interrupted.
    """

    path: Path
    header: dict[str, Any]
    outcomes: list[Outcome] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    probes: list[tuple[int, Measured]] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    end: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """True when the search ended by itself."""
        return self.end is not None

    @property
    def search(self) -> str:
        """The search's id, for example ``evopress-s0``."""
        return str(self.header["search"])

    @property
    def searcher(self) -> str:
        """Name of the searcher."""
        return str(self.header.get("searcher", self.search))

    @property
    def label(self) -> str:
        """Shown name of the searcher, which tells its variants apart."""
        return str(self.header.get("label") or self.searcher)

    @property
    def problem(self) -> str:
        """Key of the problem in its comparison."""
        return str(self.header.get("problem", ""))

    @property
    def seed(self) -> int:
        """Seed of the searcher."""
        return int(self.header.get("seed", 0))

    @cached_property
    def space(self) -> CompressionSpace | None:
        """The space that was searched, where the header holds it."""
        described = self.header.get("space")
        return None if described is None else CompressionSpace.from_json(described)

    @property
    def best(self) -> Assignment | None:
        """What the searcher recommended at the end; while it runs, the incumbent of the last checkpoint."""
        if self.end is not None:
            return None if self.end["best"] is None else decode_levels(self.end["best"])
        return self.checkpoints[-1].levels if self.checkpoints else None

    @property
    def best_loss(self) -> float:
        """Calibration loss of :attr:`best` (lower is better); inf while the search runs."""
        return math.inf if self.end is None else float(self.end["best_loss"])

    @property
    def loss(self) -> float:
        """Held-out loss of the last checkpoint (lower is better); inf when there is none."""
        return self.checkpoints[-1].loss if self.checkpoints else math.inf

    def add(self, line: Mapping[str, Any]) -> None:
        """Takes in one line."""
        kind = line["kind"]
        if kind == "outcome":
            if not self._open_batch:
                self.batches.append(0)
            self.batches[-1] += 1
            self._open_batch = bool(line.get("more"))
            self.outcomes.append(decode_outcome(line))
            self.times.append(float(line["time"]))
        elif kind == "probe":
            self.probes.append((len(self.outcomes), decode_probe(line)))
        elif kind == "checkpoint":
            self.checkpoints.append(decode_checkpoint(line))
        elif kind == "end":
            self.end = dict(line)

    _open_batch: bool = field(default=False, repr=False)


def read_journal(path: Path | str) -> SearchRecord:
    """The search that a journal tells of, finished or not.

    Raises:
        JournalError: no such file, no header, a damaged line, or a newer format.
    """
    tail = JournalTail(path)
    if not tail.path.is_file():
        raise JournalError(f"{path}: no such journal")
    lines = tail.poll()
    header = check_header(tail.path, lines)
    record = SearchRecord(tail.path, header)
    for number, line in enumerate(lines[1:], start=2):
        try:
            record.add(line)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise JournalError(f"{path}: line {number} cannot be read ({error!r}): restore the file") from error
    return record


def check_header(path: Path, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The header among a journal's lines.

    Raises:
        JournalError: the first line is no header of a format that this version reads.
    """
    if not lines or lines[0]["kind"] != "header":
        raise JournalError(f"{path}: not a journal: its first line is no header")
    if lines[0].get("format") != FORMAT:
        raise JournalError(
            f"{path}: journal format {lines[0].get('format')!r}, this version reads {FORMAT}:"
            " use the version that wrote it"
        )
    return {key: value for key, value in lines[0].items() if key not in ("kind", "format")}


def journal_paths(folder: Path | str) -> list[Path]:
    """The journals of a comparison folder (its ``journals/`` or itself), or the one journal that is named."""
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    inner = folder / "journals"
    return sorted((inner if inner.is_dir() else folder).glob("*.jsonl"))


def read_journals(folder: Path | str) -> list[SearchRecord]:
    """All searches of a comparison folder, sorted by file name; journals without a whole header are left out.

    Raises:
        JournalError: the folder has no journals, or one is damaged.
    """
    paths = journal_paths(folder)
    if not paths:
        raise JournalError(f"{folder}: no journals (*.jsonl) here: name a comparison's folder")
    return list(_readable(paths))


def _readable(paths: Sequence[Path]) -> Iterator[SearchRecord]:
    for path in paths:
        if JournalTail(path).poll():
            yield read_journal(path)
