"""What is heard of processes, and when one of them is given up."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

import pytest

from evo_hpo.run.processes import _stream


class Talking:
    """A queue in which there is always something, of somebody else."""

    def __init__(self, waiting: int | None) -> None:
        self.waiting = waiting

    def qsize(self) -> int:
        if self.waiting is None:
            raise NotImplementedError
        return self.waiting

    def empty(self) -> bool:
        return False

    def get(self, timeout: float) -> str:
        return "said"


def _processes(*codes: int | None) -> list[Any]:
    return [SimpleNamespace(exitcode=code) for code in codes]


def test_a_lost_process_is_given_up_when_what_it_may_have_left_is_heard_though_others_talk_on() -> None:
    stream = _stream(Talking(3), _processes(None, -9), lambda code: RuntimeError(str(code)))
    assert [next(stream) for _ in range(3)] == ["said"] * 3
    with pytest.raises(RuntimeError, match="-9"):
        next(stream)


def test_what_a_process_left_is_heard_before_it_is_given_up() -> None:
    events: Any = queue.Queue()
    for event in ("last words", None):
        events.put(event)
    stream = _stream(events, _processes(0, 1), lambda code: RuntimeError(str(code)))
    assert next(stream) == "last words"
    with pytest.raises(RuntimeError, match="1"):
        next(stream)


def test_a_process_that_says_that_it_is_done_may_go() -> None:
    events: Any = queue.Queue()
    for event in (None, "more", None):
        events.put(event)
    assert list(_stream(events, _processes(0, 0), lambda code: RuntimeError(str(code)))) == ["more"]


def test_where_nothing_is_counted_an_empty_queue_decides() -> None:
    stream = _stream(Talking(None), _processes(None, -9), lambda code: RuntimeError(str(code)))
    assert [next(stream) for _ in range(50)] == ["said"] * 50
