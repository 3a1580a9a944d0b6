"""The writer as a process beside the searches: low priority, never in their way, finished within a limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from evo_hpo.errors import TrackingError
from evo_hpo.tracking.location import database_path, default_uri, quiet_environment, refuse_no_store, track_command


def _to_stderr(message: str) -> None:
    sys.stderr.write(message + "\n")


class BackgroundTracker:
    """Follows the journals of a comparison's folder into MLflow while searches write them. A context manager.

    On leaving it catches up for at most ``grace`` seconds; what is left is said, with the command that catches up.
    Whatever happens to the store, the searches do not notice; the writer's messages are in ``tracking.log``.

    Args:
        folder: the comparison's folder; it may still be empty.
        tracking_uri: default: :func:`evo_hpo.tracking.default_uri`.
        grace: seconds.
        say: shows one line to the user.

    Raises:
        TrackingError: on entering, when the tracking URI is of no known kind.
    """

    def __init__(
        self,
        folder: Path | str,
        tracking_uri: str | None = None,
        *,
        grace: float = 120.0,
        say: Callable[[str], None] = _to_stderr,
    ) -> None:
        self.folder = Path(folder)
        self.given = tracking_uri
        self.uri = tracking_uri or default_uri(folder)
        self.grace = grace
        self.say = say
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> BackgroundTracker:
        database_path(self.uri)  # refuses a URI of no known kind before any work
        try:
            refuse_no_store(self.uri)
        except TrackingError as error:
            self.say(f"{error} The search goes on; tracking is tried again meanwhile.")
        self.folder.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        arguments = [str(self.folder), "--uri", self.uri, "--grace", str(self.grace)]
        with (self.folder / "tracking.log").open("ab") as messages:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "evo_hpo.tracking.writer", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                env={**os.environ, **quiet_environment(), **threads},
                start_new_session=True,  # an interrupt is for the search; the writer then catches up
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        if process is None:
            return
        try:
            output, _ = process.communicate(timeout=3.0)
        except subprocess.TimeoutExpired:
            self.say("writing the last trials to MLflow ...")
            output = self._wait(process)
        left, wrong = _left(output) if process.returncode in (0, 3) else (None, [])
        for message in wrong:
            self.say(f"not whole in MLflow: {message}")
        if left != 0:
            trials = "some trials are" if left is None else f"{left} journal lines are"
            self.say(f"{trials} not in MLflow yet (see {self.folder}/tracking.log); catch up with:")
        elif wrong:
            self.say("when that is mended, catch up with:")
        if left != 0 or wrong:
            self.say(f"  {track_command(self.folder, self.given)}")

    def _wait(self, process: subprocess.Popen[bytes]) -> bytes:
        try:
            return process.communicate(timeout=self.grace + 15.0)[0]
        except subprocess.TimeoutExpired:
            process.kill()
        except KeyboardInterrupt:  # a second interrupt: the user will not wait
            process.terminate()
        return process.communicate()[0]


def _left(output: bytes) -> tuple[int | None, list[str]]:
    """Lines that are left, None where that is not known, and what is wrong with other journals."""
    try:
        said = json.loads(output.splitlines()[-1])
        return int(said["left"]), list(said["wrong"])
    except (IndexError, ValueError, KeyError):
        return None, []
