"""Level stores on the nodes of a cluster: where a node lacks one, it copies the driver's, once for all its scorers.

Scorers map the files of their node's copy, so that packed levels are in its memory once.

Needs the extra `ray`.
"""

from __future__ import annotations

import fcntl
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PART = 1 << 24
"""Bytes of a file that pass through Ray's object store at a time."""
AHEAD = 3
"""Parts that are asked for before they are needed."""


class Stock:
    """Reads stores on the driver's node; runs as a Ray actor."""

    def manifest(self, folder: str) -> bytes | None:
        """A store's manifest; None: there is no complete store."""
        path = Path(folder) / "manifest.json"
        return path.read_bytes() if path.is_file() else None

    def part(self, folder: str, file: str, start: int) -> bytes:
        """Some bytes of a file, from a position on."""
        with (Path(folder) / file).open("rb") as opened:
            opened.seek(start)
            return opened.read(PART)


def stock_here() -> Any:
    """The actor, on the node of this process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Stock).options(num_cpus=0, max_concurrency=8, scheduling_strategy=here).remote()


def bring(folders: Sequence[Path], stock: Any, theirs: Sequence[str]) -> None:
    """Makes the stores of this node those of the driver, ``theirs``; one that the driver lacks is left as it is.

    Raises:
        StoreError: another store lies here under that name, or a file came damaged.
    """
    from evo_hpo.levels.copying import copied

    for folder, its in zip(folders, theirs, strict=True):
        manifest = ray.get(stock.manifest.remote(its))
        if manifest is not None:
            with _alone(folder):
                copied(folder, manifest, lambda record, its=its: _parts(stock, its, record.file, record.bytes))  # type: ignore[misc]


def _parts(stock: Any, folder: str, file: str, size: int) -> Iterator[bytes]:
    asked: deque[Any] = deque()
    for start in range(0, size, PART):
        asked.append(stock.part.remote(folder, file, start))
        if len(asked) > AHEAD:
            yield ray.get(asked.popleft())
    while asked:
        yield ray.get(asked.popleft())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While it lasts, no other process of the node is in here for the same folder, unless the store is there."""
    if (folder / "manifest.json").is_file():
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
