"""The journal of one search: every outcome on disk before the searcher hears of it, and back again on resume.

One file a search, one JSON line an outcome, one ``fdatasync`` a scored batch. The journal is the truth: the tracker
and the analysis read it, and an interrupted search goes on by replaying it through ask and tell.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from evo_hpo.errors import JournalError
from evo_hpo.record.changes import changes, comparable, flat, told
from evo_hpo.record.environment import environment
from evo_hpo.record.lines import (
    dump,
    encode_checkpoint,
    encode_levels,
    encode_number,
    encode_outcome,
    encode_probe,
)
from evo_hpo.record.records import FORMAT, JournalTail, SearchRecord, check_header, read_journal, read_journals
from evo_hpo.search.budget import Budget
from evo_hpo.search.loop import Checkpoint, SearchResult
from evo_hpo.search.problem import Minibatch, Problem
from evo_hpo.search.trial import Batch, Measured, Outcome, Probe, Terms, Trial
from evo_hpo.space.compression_space import Assignment

__all__ = ["CONTEXT", "Journal", "SearchRecord", "header_differences", "read_journal", "read_journals", "search_header"]

CONTEXT = ("created", "versions", "git", "machine", "threads", "title", "note")
"""Keys of a header that may differ when a search is resumed; all others must be equal."""


def search_header(
    search: str,
    searcher: str,
    problem: Problem,
    budget: Budget,
    *,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    minibatch_seed: int = 0,
    checkpoints: Sequence[float] = (),
    plan: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The header of a search: what identifies it, and where it ran.

    Args:
        search: the search's id, unique in its comparison, for example ``evopress-s0``.
        searcher, seed, settings: which searcher.
        problem: gives its name, fingerprint and space.
        budget, minibatch_seed, checkpoints: as given to :func:`evo_hpo.search.loop.search`.
        plan: what identifies the comparison (name, hash).
        more: further keys; they must be equal on resume unless named in :data:`CONTEXT`.
    """
    return {
        "search": search,
        "searcher": searcher,
        "seed": seed,
        "settings": dict(settings or {}),
        "problem": problem.name,
        "fingerprint": problem.fingerprint(),
        "tokens": problem.tokens,
        "budget": {key: value for key, value in asdict(budget).items() if value is not None},
        "minibatch_seed": minibatch_seed,
        "checkpoints": list(checkpoints),
        "plan": dict(plan or {}),
        "space": problem.space.to_json(),
        **more,
        "created": time.time(),
        **environment(),
    }


def header_differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (recorded, current) for everything that identifies a search and is not equal."""
    new = json.loads(dump(current))
    prints = comparable(
        recorded.get("fingerprint") or {}, new.get("fingerprint") or {}, recorded.get("search", "journal")
    )
    headers = (
        {k: v for k, v in header.items() if k not in CONTEXT} | {"fingerprint": found}
        for header, found in zip((recorded, new), prints, strict=True)
    )
    return changes(*(flat(header, joint=".") for header in headers))


class Journal:
    """Writes the journal of one search and replays it: a ``Recorder`` of the loop. Use as a context manager.

    Attributes:
        path: the file.
        held: what the file held when it was opened.
        replayed: outcomes given back so far.
        unsaved: lines that could not be written (full disk); tried again when the journal is closed.
        dropped: bytes of a torn line or unfinished batch that were cut off when the journal was opened.
    """

    def __init__(self, path: Path, descriptor: int, held: SearchRecord, size: int, dropped: int) -> None:
        self.path = path
        self.held = held
        self.replayed = 0
        self.dropped = dropped
        self.unsaved: list[str] = []
        self._descriptor = descriptor
        self._size = size
        self._outcomes = deque(held.outcomes)
        self._batches = deque(held.batches)
        self._probes = deque(measured for _, measured in held.probes)
        self._checkpoints = deque(held.checkpoints)

    @classmethod
    def open(cls, path: Path | str, header: Mapping[str, Any], resume: bool = False) -> Journal:
        """Starts a journal, or with ``resume`` goes on with the one that is there (if any).

        Raises:
            JournalError: the file exists and ``resume`` is false; it belongs to another search; another process
                writes to it; or it cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise JournalError(
                f"{path}: cannot be opened ({error.strerror}): choose a folder that can be written"
            ) from None
        try:
            _lock(path, descriptor)
            return cls._open(path, descriptor, header, resume)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def _open(cls, path: Path, descriptor: int, header: Mapping[str, Any], resume: bool) -> Journal:
        tail = JournalTail(path)
        lines = tail.poll()
        if lines and not resume:
            raise JournalError(f"{path}: exists already: resume it (--resume) or take another name")
        dropped = os.fstat(descriptor).st_size - tail.position
        if dropped:
            os.ftruncate(descriptor, tail.position)
        if lines:
            held = SearchRecord(path, check_header(path, lines))
            if found := header_differences(held.header, header):
                raise JournalError(
                    f"{path}: belongs to another search ({told(found)}): restore what it was made with, or take another"
                    " name"
                )
            for line in lines[1:]:
                held.add(line)
            return cls(path, descriptor, held, tail.position, dropped)
        journal = cls(path, descriptor, SearchRecord(path, dict(header)), 0, dropped)
        journal._write([dump({"kind": "header", "format": FORMAT, **header})])
        _sync_folder(path.parent)
        return journal

    # ------------------------------------------------------------------ Recorder

    def recall(self, batch: Batch, minibatch: Minibatch) -> list[Outcome]:
        """The recorded outcomes of this batch, all or none.

        Raises:
            JournalError: the journal holds another batch at this point; the message names the difference.
        """
        if not self._outcomes:
            return []
        size = self._batches.popleft()
        outcomes = [self._outcomes.popleft() for _ in range(size)]
        for trial, outcome in zip(batch, outcomes, strict=False):
            difference = _difference(trial, batch.terms, minibatch, outcome)
            if difference:
                raise JournalError(
                    f"{self.path}: trial {outcome.trial.number} is not what the searcher asks for now: {difference};"
                    " the search's code, model or data changed: start it anew under another name"
                )
        if size != len(batch):
            raise JournalError(
                f"{self.path}: at trial {outcomes[0].trial.number} a batch of {size} is recorded and {len(batch)} are"
                " asked for now: the search's code changed: start it anew under another name"
            )
        self.replayed += size
        return outcomes

    def recall_probe(self, probe: Probe, minibatch: Minibatch) -> Measured | None:
        """The recorded sensitivities of this probe.

        Raises:
            JournalError: another probe is recorded at this point.
        """
        if not self._probes:
            return None
        known = self._probes.popleft()
        if (known.probe, known.minibatch) != (probe, minibatch.seed):
            raise JournalError(
                f"{self.path}: {known.probe} on minibatch {known.minibatch} is recorded and {probe} on {minibatch.seed}"
                " asked for now: the search's code changed: start it anew under another name"
            )
        return known

    def record_probe(self, measured: Measured) -> None:
        """Writes one line of sensitivities."""
        self._write([dump(encode_probe(measured, str(self.held.header["search"]), round(time.time(), 3)))])

    def recall_checkpoint(self, fraction: float, levels: Assignment) -> Checkpoint | None:
        """The recorded checkpoint of this fraction.

        Raises:
            JournalError: it was taken of another incumbent.
        """
        if not self._checkpoints or self._checkpoints[0].fraction != fraction:
            return None
        known = self._checkpoints.popleft()
        if known.levels != tuple(levels):
            raise JournalError(
                f"{self.path}: at {fraction:.0%} of the budget the recorded incumbent is {encode_levels(known.levels)},"
                f" now it is {encode_levels(levels)}: the search's code changed: start it anew under another name"
            )
        return known

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """Writes one scored batch: a line an outcome, one write, one fdatasync.

        Raises:
            JournalError: the disk is full or fails; the batch stays in :attr:`unsaved`.
        """
        now, search, last = round(time.time(), 3), str(self.held.header["search"]), len(outcomes) - 1
        space = self.held.space
        costs = [space.cost(o.trial.levels) if space and space.ranged else None for o in outcomes]
        told = enumerate(zip(outcomes, costs, strict=True))
        self._write([dump(encode_outcome(o, search, now, last - i, cost)) for i, (o, cost) in told])

    def record_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Writes one checkpoint."""
        self._write([dump(encode_checkpoint(checkpoint, str(self.held.header["search"]), round(time.time(), 3)))])

    def finish(self, result: SearchResult) -> None:
        """Writes the end line, once."""
        if self.held.finished:
            return
        end = {
            "kind": "end",
            "search": self.held.header["search"],
            "stop_reason": result.stop_reason,
            "best": None if result.best is None else encode_levels(result.best),
            "best_loss": encode_number(result.best_loss),
            "seconds": round(result.seconds, 6),
            "searcher_seconds": round(result.searcher_seconds, 6),
            "scoring": result.scoring,
            "time": round(time.time(), 3),
        }
        self._write([dump(end)])
        self.held.end = end

    # ------------------------------------------------------------------ the file

    def _write(self, lines: Sequence[str]) -> None:
        pending = [*self.unsaved, *lines]
        data = memoryview("".join(f"{line}\n" for line in pending).encode())
        size = len(data)
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
            os.fdatasync(self._descriptor)
        except OSError as error:
            self.unsaved = pending
            with contextlib.suppress(OSError):  # opening the journal again cuts it back
                os.ftruncate(self._descriptor, self._size)
            raise JournalError(
                f"{self.path}: cannot write ({error.strerror}): {len(pending)} scored line(s) are not saved; free some"
                " space and resume (--resume): what is in the file is kept, the rest is scored again"
            ) from error
        self.unsaved = []
        self._size += size

    def close(self) -> None:
        """Tries once more to save what could not be saved, and closes the file."""
        if self._descriptor < 0:
            return
        try:
            if self.unsaved:
                self._write([])
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except JournalError:
            if error is None:
                raise


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise JournalError(f"{path}: another process is writing to it: wait for it, or stop it") from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _difference(trial: Trial, terms: Terms, minibatch: Minibatch, outcome: Outcome) -> str:
    """What a trial and the recorded one do not share; empty when nothing."""
    recorded = outcome.trial
    if recorded == trial and outcome.terms == terms and outcome.minibatch == minibatch.seed:
        return ""
    if recorded.levels != trial.levels:
        pairs = zip(recorded.levels, trial.levels, strict=False)
        unit = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if unit is None:
            return f"recorded {len(recorded.levels)} units, asked {len(trial.levels)}"
        return f"unit {unit} recorded at level {recorded.levels[unit]}, asked at {trial.levels[unit]}"
    if outcome.minibatch != minibatch.seed:
        return f"recorded on minibatch {outcome.minibatch}, asked on {minibatch.seed}"
    was, asked = asdict(recorded) | asdict(outcome.terms), asdict(trial) | asdict(terms)
    for name in was:
        if name != "note" and (old := was[name]) != (new := asked[name]):
            return f"{name} recorded as {old!r}, asked as {new!r}"
    return ""
