"""Processes of searches, started without importing everything anew: forked from a process that imported it once.

Each is a process of its own, with arguments that were pickled, the folder and the environment of now, as when it is
spawned; that searches run in spawned processes is tested where a command is run as its user would run it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import Any

IMPORTED = [
    "benchmarks.problems.synthetic",
    "evo_hpo.run.search_process",
    "evo_hpo.scoring.task",
    "nevergrad",
    "searchers.evopress.evopress",
    "searchers.uniform",
    "tests.warm",
    "transformers.models.llama.modeling_llama",
]


class Forking:
    """Stands for a context of :mod:`multiprocessing`."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED)

    def Queue(self) -> Queue[Any]:
        return self._context.Queue()

    def Process(self, *, target: Callable[..., None], args: tuple[Any, ...], daemon: bool) -> BaseProcess:
        return self._context.Process(target=_run, args=(dict(os.environ), target, args), daemon=daemon)


def _run(environment: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)
