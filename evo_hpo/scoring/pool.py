"""Replicas that work side by side: one core each on a CPU, a single one on a GPU."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
        self._threads = ThreadPoolExecutor(len(replicas), initializer=_one_core if on_cpu else None)

    def __len__(self) -> int:
        return len(self.replicas)

    def map(self, tasks: Sequence[Callable[[Replica], T]]) -> list[T]:
        """Results of the tasks, in order."""
        before = torch.get_num_threads()
        if self._on_cpu:
            torch.set_num_threads(1)
        try:
            if len(self) == 1 or len(tasks) < 2:
                return [self._call(task) for task in tasks]
            return list(self._threads.map(self._call, tasks))
        finally:
            torch.set_num_threads(before)

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Results of tasks that bring models of their own, in order; whatever fails, all of them end before."""

        def outcome(task: Callable[[], T]) -> Callable[[Replica], tuple[list[T], BaseException | None]]:
            def run(_: Replica) -> tuple[list[T], BaseException | None]:
                try:
                    return [task()], None
                except BaseException as error:  # raised below
                    return [], error

            return run

        outcomes = self.map([outcome(task) for task in tasks])
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for found, _ in outcomes for result in found]

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


def _one_core() -> None:
    torch.set_num_threads(1)
