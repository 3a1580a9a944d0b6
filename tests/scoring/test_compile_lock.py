"""Threads that work, and one that is alone: who waits for whom."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from evo_hpo.scoring.compile_lock import CompileLock, GuardLock

WAIT = 30.0
"""Seconds after which a thread is taken for stuck."""


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_several_work_at_once() -> None:
    lock, both = CompileLock(), threading.Barrier(2)

    def work() -> None:
        with lock.working(), lock.working():
            both.wait(WAIT)

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(work) for _ in range(2)]:
            done.result()


@pytest.mark.parametrize("as_it_works", [False, True])
def test_who_is_alone_waits_for_those_who_work_until_they_let_it_pass(as_it_works: bool) -> None:
    lock, order = CompileLock(), list[str]()

    def compile_something() -> None:
        if as_it_works:
            with lock.working(), lock.alone():
                order.append("alone")
        else:
            with lock.alone():
                order.append("alone")

    with lock.working():
        other = started(compile_something)
        for _ in range(1000):
            if not lock._waiting:
                other.join(WAIT / 1000)
        order.append("works")
        assert order == ["works"]
        lock.let_pass()
        order.append("goes on")
    other.join(WAIT)
    assert order == ["works", "alone", "goes on"]


def test_nobody_works_while_another_is_alone() -> None:
    lock, begun, order = CompileLock(), threading.Event(), list[str]()

    def work() -> None:
        begun.set()
        with lock.working():
            order.append("works")

    with lock.alone():
        other = started(work)
        begun.wait(WAIT)
        other.join(0.05)
        order.append("alone")
    other.join(WAIT)
    assert order == ["alone", "works"]


def test_threads_that_all_ask_to_be_alone_are_so_one_by_one() -> None:
    lock, inside, most = CompileLock(), 0, 0

    def work(_: int) -> None:
        nonlocal inside, most
        with lock.working():
            for _ in range(50):
                with lock.alone():
                    inside += 1
                    most = max(most, inside)
                    inside -= 1
                lock.let_pass()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert most == 1
    assert (lock._working, lock._waiting, lock._alone) == (0, 0, False)


@pytest.mark.parametrize("way", ["working", "alone"])
def test_what_fails_leaves_nothing_locked(way: str) -> None:
    lock = CompileLock()
    with pytest.raises(ValueError, match="fails"), lock.working(), getattr(lock, way)():
        raise ValueError("fails")
    other = started(lambda: lock.alone().__enter__())
    other.join(WAIT)
    assert not other.is_alive()


def test_an_interruption_while_it_waits_to_go_on_locks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = CompileLock()

    def interrupted() -> None:
        raise KeyboardInterrupt

    def work() -> None:
        with lock.working(), monkeypatch.context() as patch:
            patch.setattr(lock, "_enter", interrupted)
            with lock.alone():
                pass

    with pytest.raises(KeyboardInterrupt):
        work()
    assert (lock._working, lock._waiting, lock._alone) == (0, 0, False)


def test_one_thread_looks_at_a_time_until_it_has_found_something_to_run() -> None:
    lock, order = GuardLock(), list[str]()
    looks, found, run = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with lock.looking(), lock.looking():  # one inside another is the same look
            looks.set()
            order.append("second waits" if not found.wait(0.05) else "second did not wait")
            order.append("first has found")
            lock.over()
            assert run.wait(WAIT)  # while the other looks

    def second() -> None:
        with lock.looking():
            found.set()
            order.append("second looks")
        run.set()

    threads = [started(first)]
    assert looks.wait(WAIT)
    threads.append(started(second))
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert order == ["second waits", "first has found", "second looks"]


def test_who_fails_as_it_looks_leaves_the_turn_to_others() -> None:
    lock = GuardLock()
    with pytest.raises(ValueError, match="no"), lock.looking():
        raise ValueError("no")
    lock.over()  # of who does not look
    with lock.looking():
        pass
    assert not lock._lock.locked()
