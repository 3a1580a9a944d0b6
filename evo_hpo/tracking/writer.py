"""Replays journals into a tracker; as a process of its own it follows searches while they run.

    python -m evo_hpo.tracking.writer FOLDER --uri URI

ends when its standard input is closed (or its parent dies), after a last catch-up that takes at most ``--grace``
seconds.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import os
import select
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evo_hpo.errors import EvoHpoError, JournalError, RefusedError, TrackingError
from evo_hpo.files import file_lock
from evo_hpo.record.comparison import Comparison
from evo_hpo.record.records import JournalTail, SearchRecord, check_header, journal_paths
from evo_hpo.tracking.location import refuse_no_store
from evo_hpo.tracking.tracker import SearchTracker, Tracker

CHUNK = 200
"""Lines that are committed together."""

log = logging.getLogger("evo_hpo.tracking")


class JournalReplay:
    """One journal on its way into a tracker. What is wrong with it alone keeps no other journal waiting.

    Attributes:
        waiting: lines read and not yet in the store.
        damage: why it cannot be read on; it is looked at again once its file has changed.
        refusal: why its lines cannot be written; they are not tried again.
    """

    def __init__(self, path: Path) -> None:
        self.tail = JournalTail(path)
        self._record: SearchRecord | None = None
        self.waiting: list[dict[str, Any]] = []
        self.tracker: SearchTracker | None = None
        self.ended = False
        self.damage: JournalError | None = None
        self.refusal: EvoHpoError | None = None
        self._changed = 0

    def read(self) -> None:
        """Takes in what the journal has grown by."""
        if self.ended or self.refusal:
            return
        try:
            changed = self.tail.path.stat().st_mtime_ns
            if self.damage and changed == self._changed:
                return
            self._changed = changed
            new = self.tail.poll()
        except FileNotFoundError:
            return
        except JournalError as error:
            self.damage = error
            return
        except OSError as error:
            self.damage, self._changed = JournalError(f"{self.tail.path}: cannot be read ({error.strerror})"), 0
            return
        self.damage = None
        for line in new:
            try:
                self._understand(line)
            except JournalError as error:
                self.refusal = error
                return
            self.waiting.append(line)
        self.ended = bool(new) and new[-1]["kind"] == "end"

    def _understand(self, line: dict[str, Any]) -> None:
        """Raises JournalError for a line that lacks something, or a first one of another format."""
        try:
            if self._record is None:
                self._record = SearchRecord(self.tail.path, check_header(self.tail.path, [line]))
            else:
                self._record.add(line)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            if isinstance(error, JournalError):
                raise
            raise JournalError(f"{self.tail.path}: a line cannot be read ({error!r}): restore the file") from error

    def step(self, tracker: Tracker) -> int:
        """Writes the next chunk and returns how many of its lines were new to the store.

        Raises:
            TrackingError: the store cannot be reached; nothing is lost, call again.
        """
        if not self.waiting or self.refusal:
            return 0
        try:
            return self._step(tracker)
        except (JournalError, RefusedError) as error:
            self.refusal = error
        return 0

    def _step(self, tracker: Tracker) -> int:
        if self.tracker is None:
            self.tracker = tracker.search(check_header(self.tail.path, self.waiting))
            seen, self.waiting = self.waiting[: self.tracker.committed], self.waiting[self.tracker.committed :]
            self.tracker.log(seen)
            return 0
        chunk = self.waiting[:CHUNK]
        self.tracker.log(chunk)
        self.waiting = self.waiting[CHUNK:]
        return len(chunk)

    def leave(self) -> None:
        """Marks an interrupted search as such."""
        if self.tracker is not None and not self.waiting:
            try:
                self.tracker.leave(running=_being_written(self.tail.path))
            except RefusedError as error:
                self.refusal = error


def _being_written(path: Path) -> bool:
    """True while a search holds the journal's lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


class Replayer:
    """All journals of a folder on their way into one tracker; new journals are picked up as they appear.

    Args:
        folder: a comparison's folder, or one journal.
        connect: makes the tracker; called again until it succeeds.
    """

    def __init__(self, folder: Path, connect: Callable[[], Tracker]) -> None:
        self.folder = folder
        self.connect = connect
        self.tracker: Tracker | None = None
        self.replays: dict[Path, JournalReplay] = {}

    def read(self) -> int:
        """Looks for new journals and lines; returns how many lines wait."""
        for path in journal_paths(self.folder):
            if path not in self.replays:
                self.replays[path] = JournalReplay(path)
        for replay in self.replays.values():
            replay.read()
        return self.waiting

    @property
    def waiting(self) -> int:
        """Lines that are read and not in the store, without those that cannot be written."""
        return sum(len(r.waiting) for r in self.replays.values() if not r.refusal)

    @property
    def errors(self) -> list[EvoHpoError]:
        """Why some journals are not in the store, or not whole, whatever the others are."""
        return [error for r in self.replays.values() if (error := r.refusal or r.damage)]

    def step(self) -> int:
        """Writes one chunk of every journal that has one; returns how many lines were new to the store.

        Raises:
            TrackingError: the store cannot be reached; nothing is lost, call again.
        """
        if self.tracker is None:
            self.tracker = self.connect()
        return sum(replay.step(self.tracker) for replay in self.replays.values())

    def leave(self) -> None:
        """Marks interrupted searches as such."""
        for replay in self.replays.values():
            replay.leave()


def replay(folder: Path, uri: str) -> int:
    """See :func:`evo_hpo.tracking.track`."""
    if not journal_paths(folder) or (folder.is_file() and folder.suffix != ".jsonl"):
        raise JournalError(f"{folder}: no journals (*.jsonl) here: name a comparison's folder or a journal")
    replayer = Replayer(folder, lambda: _mlflow(folder, uri))
    with file_lock(_lock_path(folder, uri), wait=False) as free:
        if not free:
            raise TrackingError(f"{folder}: another process is tracking it already: wait for it to end")
        total = 0
        try:
            while replayer.read():
                total += replayer.step()
        finally:
            replayer.leave()
    if Comparison.lies_in(folder):
        from evo_hpo.tracking.own_run import upload

        upload(folder, uri)
    if errors := replayer.errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        others = "; the other journals are in MLflow" if len(replayer.replays) > len(errors) else ""
        raise type(errors[0])(f"{errors[0]}{more}{others}") from errors[0]
    return total


def _mlflow(folder: Path, uri: str) -> Tracker:
    refuse_no_store(uri)  # before MLflow is imported, which takes seconds
    from evo_hpo.tracking.mlflow_tracker import MlflowTracker, experiment_name

    return MlflowTracker(uri, experiment_name(folder))


def _lock_path(folder: Path, uri: str) -> Path:
    """One writer a folder and store: the lock lies in the folder, or beside nothing where that cannot be written."""
    folder = folder.resolve()
    folder = folder.parent if folder.is_file() else folder
    folder = folder.parent if folder.name == "journals" else folder
    name = hashlib.sha256(f"{folder}\n{uri}".encode()).hexdigest()[:8]
    if os.access(folder, os.W_OK):
        return folder / f".tracking-{name}.lock"
    return Path(tempfile.gettempdir()) / f"evo-hpo-tracking-{os.getuid()}-{name}.lock"


def follow_until_closed(folder: Path, uri: str, grace: float) -> tuple[int, list[str]]:
    """Follows the journals until standard input is closed, then catches up.

    Nothing that the store does ends it: failures are logged and tried again, at growing intervals. Nobody waits for
    journals that cannot be read or written.

    Returns:
        The number of lines that are left, and what is wrong with journals that are not among them.
    """
    replayer = Replayer(folder, lambda: _mlflow(folder, uri))
    pause, deadline, logged = 0.5, float("inf"), set[str]()
    with file_lock(_lock_path(folder, uri)):
        while True:
            try:
                waiting = replayer.read()
                replayer.step()
                pause = 0.5
            except (EvoHpoError, OSError) as error:
                log.warning("%s", error)
                waiting, pause = 1, min(2 * pause, 10.0)
            except Exception:  # whatever it is, the search goes on and the journal keeps everything
                log.exception("tracking failed, trying again")
                waiting, pause = 1, min(2 * pause, 10.0)
            for found in replayer.errors:
                if str(found) not in logged:
                    log.warning("%s", found, exc_info=found.__cause__)
                    logged.add(str(found))
            if deadline == float("inf"):
                if _closed(0.0 if replayer.waiting and pause == 0.5 else pause):
                    deadline = time.monotonic() + grace
                    if pause > 0.5 and _hopeless(uri):
                        break
                continue
            if not waiting or time.monotonic() > deadline or (pause > 0.5 and _hopeless(uri)):
                break
            if pause > 0.5:
                time.sleep(max(0.0, min(pause, 1.0, deadline - time.monotonic())))
        try:
            replayer.read()  # what came since a store that gives no answer was last tried is left too
            replayer.leave()
        except (EvoHpoError, OSError) as error:
            log.warning("%s", error)
    return replayer.waiting, [str(error) for error in replayer.errors]


def _hopeless(uri: str) -> bool:
    """True of a server that does not answer or a file that is no database: nobody should wait for it at the end."""
    try:
        refuse_no_store(uri)
    except TrackingError:
        return True
    return False


def _closed(wait: float) -> bool:
    """True when standard input ended; waits up to ``wait`` seconds for it."""
    ready, _, _ = select.select([0], [], [], wait)
    return bool(ready) and not os.read(0, 4096)


def main() -> int:
    """Runs as a process; the last line of its output says what is left, as JSON."""
    parser = argparse.ArgumentParser(prog="evo_hpo.tracking.writer")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--grace", type=float, default=60.0)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    os.nice(15)
    left, wrong = follow_until_closed(arguments.folder, arguments.uri, arguments.grace)
    try:
        sys.stdout.write(json.dumps({"left": left, "wrong": wrong}) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # whoever wanted to know was killed; what is left is in the journals
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0 if not left and not wrong else 3


if __name__ == "__main__":
    sys.exit(main())
