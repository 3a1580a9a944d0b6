"""While one thread compiles, no other runs the model.

That something compiles is a flag of the whole process in PyTorch, and models ask for it: transformers builds another
attention mask then, whose products have other bits. So a thread that compiles waits until the others are between two
calls of compiled code, or done, and they wait there until it has compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CompileLock:
    """Many threads work, or one is alone.

    Who works has to call :meth:`let_pass` where it can wait, or others are alone only once it is done.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = 0
        self._waiting = 0  # to be alone
        self._alone = False
        self._own = threading.local()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Not while another thread is alone, or waits for it."""
        outermost = not self._is_working()
        if outermost:
            self._enter()
        try:
            yield
        finally:
            if outermost and self._is_working():  # not if it was interrupted where it waited to go on
                self._leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While nobody else works; what this thread works at is interrupted."""
        was_working = self._is_working()
        if was_working:
            self._leave()
        try:
            own = False
            try:
                with self._changed:
                    self._waiting += 1
                    try:
                        self._changed.wait_for(lambda: not self._working and not self._alone)
                        own = self._alone = True
                    finally:
                        self._waiting -= 1
                        self._changed.notify_all()
                yield
            finally:
                if own:
                    with self._changed:
                        self._alone = False
                        self._changed.notify_all()
        finally:
            if was_working:
                self._enter()

    def let_pass(self) -> None:
        """Lets threads that wait to be alone go first."""
        if self._waiting and self._is_working():
            self._leave()
            self._enter()

    def _is_working(self) -> bool:
        return getattr(self._own, "working", False)

    def _enter(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._working += 1
        self._own.working = True

    def _leave(self) -> None:
        self._own.working = False
        with self._changed:
            self._working -= 1
            self._changed.notify_all()


class GuardLock:
    """One thread at a time sees which of its compiled versions a call can take.

    In PyTorch 2.13 what looks for aliases among inputs remembers them in itself: two threads that look at once may find
    that no version fits, and one compiles again ("runtime guards failed even though they passed"), beside the other.
    """

    def __init__(self) -> None:
        self._lock, self._own = threading.Lock(), threading.local()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Until :meth:`over`, or to the end where that is not called."""
        if getattr(self._own, "looks", False):  # one inside another: it is this thread's turn
            yield
            return
        self._lock.acquire()
        self._own.looks = True
        try:
            yield
        finally:
            self.over()

    def over(self) -> None:
        """This thread has found a version, and runs it."""
        if getattr(self._own, "looks", False):
            self._own.looks = False
            self._lock.release()


GUARD_LOCK = GuardLock()

COMPILE_LOCK = CompileLock()
"""Of this process, as the flag is."""
