"""Measured assignments in a file that only grows, so that a recording can be killed and goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from evo_hpo.errors import JournalError
from evo_hpo.space.compression_space import Assignment

Losses = tuple[float, ...]
"""KL(dense || compressed) of each sequence, mean over its predicted positions, nats a token; lower is better.

In the order of the evaluator's minibatch."""


class KeptLosses:
    """Assignment -> losses, in the order of measurement, one JSON line each.

    Args:
        path: the file; what is in it is read, a line torn by a kill is cut off.
        context: identifies model, levels and text; it is the file's first line.

    Raises:
        JournalError: the file was recorded in another context.
    """

    def __init__(self, path: Path, context: str) -> None:
        self.path = path
        self.found: dict[Assignment, Losses] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b""
        kept = whole[: whole.rfind(b"\n") + 1]
        if kept != whole:
            path.write_bytes(kept)
        lines = kept.decode().splitlines()
        if lines and json.loads(lines[0]) != {"context": context}:
            raise JournalError(f"{str(path)!r} was recorded as {lines[0]}, not as {context!r}: choose another file")
        for line in lines[1:]:
            entry = json.loads(line)
            self.found[tuple(map(int, entry["levels"]))] = tuple(entry["losses"])
        if not lines:
            self._write([json.dumps({"context": context})])

    def missing(self, assignments: Iterable[Assignment]) -> list[Assignment]:
        """Those without losses, each once, in order."""
        return [a for a in dict.fromkeys(assignments) if a not in self.found]

    def add(self, losses: Mapping[Assignment, Sequence[float]]) -> None:
        """Appends rows and waits until they are on the disk."""
        lines = []
        for assignment, values in losses.items():
            self.found[assignment] = tuple(float(f"{v:.7g}") for v in values)
            lines.append(json.dumps({"levels": "".join(map(str, assignment)), "losses": self.found[assignment]}))
        self._write(lines)

    def _write(self, lines: Sequence[str]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
