"""Replicas that work side by side: one core each on a CPU, a single one on a GPU."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TypeVar

import torch

from evo_hpo.scoring.compile_lock import COMPILE_LOCK
from evo_hpo.scoring.replica import Replica, Timing

T = TypeVar("T")


class ReplicaPool:
    """Runs tasks on free replicas.

    Two threads with a replica each, every operation on one core, are at least as fast as operations split over two
    cores, do not collapse beside other busy processes, and leave each result independent of the number of threads.

    Args:
        replicas: at least one; they share weights.
        on_cpu: restrict operations to one core each while tasks run.
    """

    def __init__(self, replicas: Sequence[Replica], on_cpu: bool) -> None:
        self.replicas = tuple(replicas)
        self._on_cpu = on_cpu
        self._free: queue.SimpleQueue[Replica] = queue.SimpleQueue()
        for replica in replicas:
            self._free.put(replica)
        begin = partial(torch.set_num_threads, 1) if on_cpu else None
        self._threads = ThreadPoolExecutor(len(replicas), initializer=begin)

    def __len__(self) -> int:
        return len(self.replicas)

    def map(self, tasks: Sequence[Callable[[Replica], T]]) -> list[T]:
        """Results of the tasks, in order; if one fails, or the wait is interrupted, once none runs any more."""
        with one_core() if self._on_cpu else nullcontext():
            if len(self) == 1 or len(tasks) < 2:
                return [self._call(task) for task in tasks]
            waiting = [self._threads.submit(self._call, task) for task in tasks][::-1]
            results = []
            try:
                while waiting:  # taken off: an error would hold the future that holds it
                    results.append(waiting.pop().result())
                return results
            finally:
                _end(waiting)

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Results of tasks that bring models of their own; as :meth:`map`."""

        def alone(task: Callable[[], T]) -> Callable[[Replica], T]:
            return lambda _: task()

        return self.map([alone(task) for task in tasks])

    def shrink(self, count: int) -> None:
        """Uses fewer replicas from now on; call it while none is busy."""
        while len(self.replicas) > max(count, 1):
            gone = self._free.get()
            self.replicas = tuple(replica for replica in self.replicas if replica is not gone)

    def timing(self) -> Timing:
        """Summed over all replicas."""
        total = Timing()
        for replica in self.replicas:
            total.add(replica.timing)
        return total

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()

    def _call(self, task: Callable[[Replica], T]) -> T:
        replica = self._free.get()
        try:
            with COMPILE_LOCK.working():
                return task(replica)
        finally:
            self._free.put(replica)


@contextmanager
def one_core() -> Iterator[None]:
    """Operations of this thread run on one core: how many there are changes the last bits of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _end(futures: Sequence[Future[T]]) -> None:
    for future in futures:
        future.cancel()
    wait(futures)
