"""Processes of searches, started without importing everything anew: forked from one that knows what this one imported.

Each is a process of its own, with arguments that were pickled, the folder and the environment of now, as when it is
spawned; that searches run in spawned processes is tested where a command is run as its user would run it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import forkserver, util
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import Any
from unittest.mock import patch


class Forking:
    """Stands for a context of :mod:`multiprocessing`; its server is made now, so before a test has changed anything."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.warm"])
        with patch.object(util, "spawnv_passfds", _fork):
            forkserver.ensure_running()

    def Queue(self) -> Queue[Any]:
        return self._context.Queue()

    def Process(self, *, target: Callable[..., None], args: tuple[Any, ...], daemon: bool) -> BaseProcess:
        return self._context.Process(target=_run, args=(dict(os.environ), target, args), daemon=daemon)


def _fork(path: str, args: Sequence[str], kept: Sequence[int]) -> int:
    """Runs what another interpreter would be told to run (``-c``) in a fork of this one; returns its process."""
    if child := os.fork():
        return child
    code = 1
    try:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        logging.root.handlers.clear()
        warnings.resetwarnings()
        for file in map(int, os.listdir("/dev/fd")):
            if file > 2 and file not in kept:
                with suppress(OSError):  # of the listing itself
                    os.close(file)
        exec(args[-1], {})
    except SystemExit:
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _run(environment: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)
