"""Replicas that work side by side: one core each on a CPU, a single one on a GPU."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from evo_hpo.scoring.worker import Timing, Worker

__all__ = ["WorkerPool"]

T = TypeVar("T")


class WorkerPool:
    """Runs tasks on free workers.

    Two threads with a replica each, every operation on one core, are at least as fast as operations split over two
    cores, do not collapse beside other busy processes, and leave each result independent of the number of threads.

    Args:
        workers: at least one; they share weights.
        on_cpu: restrict operations to one core each while tasks run.
    """

    def __init__(self, workers: Sequence[Worker], on_cpu: bool) -> None:
        self.workers = tuple(workers)
        self._on_cpu = on_cpu
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in workers:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(len(workers), initializer=_one_core if on_cpu else None)

    def __len__(self) -> int:
        return len(self.workers)

    def map(self, tasks: Sequence[Callable[[Worker], T]]) -> list[T]:
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

    def shrink(self, count: int) -> None:
        """Uses fewer workers from now on; call it while none is busy."""
        while len(self.workers) > max(count, 1):
            gone = self._free.get()
            self.workers = tuple(worker for worker in self.workers if worker is not gone)

    def timing(self) -> Timing:
        """Summed over all workers."""
        total = Timing()
        for worker in self.workers:
            total.add(worker.timing)
        return total

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()

    def _call(self, task: Callable[[Worker], T]) -> T:
        worker = self._free.get()
        try:
            return task(worker)
        finally:
            self._free.put(worker)


def _one_core() -> None:
    torch.set_num_threads(1)
