"""Processes that work beside this one, end with it, and tell what happens through one queue."""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

PROCESSES: Any = multiprocessing.get_context("spawn")  # nothing of this process may leak into those that it starts

Worker = tuple[Callable[..., None], tuple[Any, ...]]
"""A function and its arguments; what it puts into the last one, the queue of events, is heard: None when it is done."""


@contextmanager
def running(
    workers: Sequence[Worker], events: Any, ended: Callable[[int], Exception], *, children: bool = False
) -> Iterator[Iterator[Any]]:
    """Starts a process for each worker and gives the stream of their events; leaves no process behind.

    Args:
        events: a queue of `PROCESSES`.
        ended: the error of a process that ended without a word, by its exit code.
        children: whether they may start processes themselves.
    """
    processes = [PROCESSES.Process(target=target, args=args, daemon=not children) for target, args in workers]
    started = []
    try:
        with _main_left_out():
            for process in processes:
                process.start()
                started.append(process)
        yield _stream(events, processes, ended)
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
        for process in started:
            process.join(timeout=10)
            process.kill()
        events.cancel_join_thread()


def follow_parent() -> None:
    """Leaves interrupts to this process's parent, and ends it when the parent is gone, also when that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _main_left_out() -> Iterator[None]:
    """Processes that start meanwhile do not run the user's script, or import the command line, once more."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _stream(events: Any, processes: Sequence[Any], ended: Callable[[int], Exception]) -> Iterator[Any]:
    working, left = len(processes), math.inf  # events that a process which went without a word may have left behind
    while working:
        codes = [p.exitcode for p in processes if p.exitcode is not None]
        lost = len(codes) > len(processes) - working
        left = min(left, _queued(events)) if lost else math.inf
        if lost and (left <= 0 or events.empty()):
            raise ended(max(codes, key=bool))
        try:
            event = events.get(timeout=0.2)
        except queue.Empty:
            continue
        left -= 1
        if event is None:
            working -= 1
        else:
            yield event


def _queued(events: Any) -> float:
    """Events that wait, as far as the system counts them."""
    try:
        return float(events.qsize())
    except NotImplementedError:  # macOS
        return math.inf
