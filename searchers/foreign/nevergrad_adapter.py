"""Nevergrad's optimizers as searchers: every registered one by its own name, ``nevergrad:DiscreteOnePlusOne``.

The parametrization is one bounded array, integer-cast or continuous as the encoding asks. A repaired point is told in
the place of the candidate that was asked, so that optimizers that count, pair or replace their candidates go on
working. Many optimizers draw from numpy's global generator; it is lent to them seeded, and given back as it was.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np

from evo_hpo.errors import EvoHpoError, InvalidSettingError, MissingPackageError, UnknownNameError
from evo_hpo.search.searcher import Searcher, number, positive
from evo_hpo.search.trial import Outcome
from evo_hpo.space.compression_space import CompressionSpace
from searchers.foreign.encoding import ENCODINGS, Decoded
from searchers.foreign.foreign import ForeignSearcher
from searchers.foreign.nevergrad_limits import why_not

_GLOBAL = threading.RLock()  # whoever has numpy's global generator
SIGMA = 0.5
TWO_LEVEL_SIGMA = 2.0  # of CMA: with less, what it draws between 0 and 1 is hardly ever anything but the start


@cache
def load() -> Any:
    """The package nevergrad, imported on first use (seconds).

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nevergrad
    except ImportError as error:
        raise MissingPackageError(
            "nevergrad searchers need the package nevergrad: pip install 'nevergrad>=1.0.12'"
        ) from error
    return nevergrad


def _let_threads_finish(limit: float = 300.0) -> None:
    """Waits until every solver that Nevergrad runs in a thread has posted its next point or ended.

    A solver that goes on thinking after ``tell`` has returned would draw from numpy's generator after it was given
    back. It is thinking as long as it has been told as often as it has asked.
    """
    recaster = load().optimization.recaster
    until = time.monotonic() + limit
    for thread in threading.enumerate():
        if isinstance(thread, recaster._MessagingThread):
            asks, tells = thread.messages_ask, thread.messages_tell
            while thread.is_alive() and asks.unfinished_tasks <= tells.unfinished_tasks and time.monotonic() < until:
                time.sleep(0.0001)


class NevergradSearcher(ForeignSearcher):
    """An optimizer of Nevergrad.

    Args:
        sigma: width of the first mutations, as a fraction of a coordinate's range; None: 0.5, but 2 for CMA and its kin
            where units have two levels only.
        horizon: trials that the optimizer is told to expect; None: what the budget pays for (1000 where it is seconds).
    """

    optimizer_name: ClassVar[str] = "DiscreteOnePlusOne"
    encodings = tuple(name for name in ENCODINGS if name not in ("set_constraint", "sequential"))

    def __init__(
        self,
        space: CompressionSpace,
        *,
        seed: int = 0,
        sigma: float | None = None,
        horizon: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(space, seed=seed, **settings)
        if sigma is None:
            sigma = TWO_LEVEL_SIGMA if space.two_levels and "CMA" in self.optimizer_name else SIGMA
        self.sigma = number("sigma", sigma)
        self.horizon = horizon if horizon is None else positive("horizon", horizon)
        self.optimizer: Any = None
        self._numpy_state = np.random.RandomState(self._library_seed ^ 0x5EED).get_state()
        self._worst = 1.0
        self._given = 0  # of the starts
        self._running: list[tuple[Any, Decoded]] = []
        self._waiting: list[tuple[Any, Decoded]] = []

    @cached_property
    def _bounds(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Least and greatest value of each coordinate, of the idle one too."""
        low, high = self._ranges
        return self._padded(low), self._padded(high, 1.0)

    def _padded(self, point: Any, idle: float = 0.0) -> np.ndarray[Any, Any]:
        """The point, where it has one coordinate only with a second one that nothing reads.

        In one dimension Nevergrad's CMA sets ``fcmaes`` on the settings that its registered optimizers share, for the
        rest of the process.
        """
        return np.asarray([*point, idle] if len(point) == 1 else point, float)

    def _read(self, candidate: Any) -> list[float]:
        """The coordinates of a candidate, without the idle one."""
        values: list[float] = candidate.value.ravel().tolist()
        return values[: len(self.encoding.free)]

    @cached_property
    def _ranges(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if self.encoding.continuous:
            return np.zeros(len(self.encoding.free)), np.ones(len(self.encoding.free))
        return np.asarray(self.encoding.low, float), np.asarray(self.encoding.high, float)

    def _make(self) -> Any:
        ng = load()
        low, high = self._bounds
        first = self._padded(self._start().told) if self.start == "uniform" else (low + high) / 2
        array = ng.p.Array(init=np.clip(first, low, high)).set_bounds(low, high)
        array.set_mutation(sigma=self.sigma * float((high - low).max()))
        if not self.encoding.continuous:
            array.set_integer_casting()
        array.random_state = np.random.RandomState(self._library_seed)
        horizon = self.horizon or self.allowance.affords(10**9, self.tokens)
        if horizon >= 10**9:
            horizon = 1000
        # Some cannot be made for a single trial.
        return ng.optimizers.registry[self.optimizer_name](array, budget=max(horizon, 2), num_workers=self.batch)

    @contextmanager
    def _lent(self, doing: str) -> Iterator[None]:
        """Lends the optimizer numpy's global generator in this searcher's own state, and names it in its errors."""
        with _GLOBAL, self._swapped(doing):
            yield

    @contextmanager
    def _swapped(self, doing: str) -> Iterator[None]:
        ours = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self._numpy_state)  # noqa: NPY002
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
                _let_threads_finish()
        except (MemoryError, KeyboardInterrupt, EvoHpoError):
            raise
        except ImportError as error:
            raise MissingPackageError(f"nevergrad's {self.optimizer_name} needs another package: {error}") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise InvalidSettingError(
                f"nevergrad's {self.optimizer_name} failed while {doing} ({reason}): take another optimizer"
            ) from error
        finally:
            self._numpy_state = np.random.get_state()  # noqa: NPY002
            np.random.set_state(ours)  # noqa: NPY002

    def proposals(self, count: int) -> list[Decoded] | None:
        """The optimizer's candidates; the first batch is the uniform assignment where it starts there."""
        if self._asked and not self.allowance.affords(1, self.tokens):  # designs of a fixed size have no more
            self.stop_reason = "the budget does not pay for another trial"
            return None
        with self._lent("being asked"):
            if self.optimizer is None:
                self.optimizer = self._make()
            self._running = []
            if self.start == "uniform":
                left = range(self._given, min(self._given + count, len(self._starts)))
                self._running = [self._first() if number == 0 else (None, self._start(number)) for number in left]
                self._given += len(left)
            while len(self._running) < count:
                self._running.append(self._waiting.pop() if self._waiting else self._candidate())
        return [decoded for _, decoded in self._running]

    def _candidate(self) -> tuple[Any, Decoded]:
        candidate = self.optimizer.ask()
        return candidate, self.encoding.decode(self._read(candidate))

    def _first(self) -> tuple[Any, Decoded]:
        """The uniform assignment: the optimizer's own first candidate where it is that, else a point of ours."""
        start = self._start()
        candidate, decoded = self._candidate()
        if decoded.levels == start.levels:
            return candidate, decoded
        self._waiting.append((candidate, decoded))
        return None, start

    def _told(self, candidate: Any, decoded: Decoded) -> Any:
        """The candidate to tell: the one asked, or the repaired point in its place."""
        told = self._padded(decoded.told)
        if candidate is None:
            return self.optimizer.parametrization.spawn_child(new_value=told)
        if list(decoded.told) == self._read(candidate):
            return candidate
        twin = candidate.spawn_child(new_value=told)
        twin.uid, twin._meta = candidate.uid, dict(candidate._meta)
        for stale in ("boxed_data", "x_probe", "#CMA#datacache"):  # the library's caches of the point
            twin._meta.pop(stale, None)
        return twin

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Tells every paid trial; a failed one with an infinite loss, as Nevergrad itself does."""
        if not self.encoding.free:
            return
        unsupported = load().errors.TellNotAskedNotSupportedError
        with self._lent("being told"):
            for (candidate, decoded), outcome in zip(self._running, outcomes, strict=False):
                if outcome.usable:
                    self._worst = max(self._worst, outcome.loss)
                failed = 10 * self._worst if self.space.ranged else math.inf  # a hypervolume takes no infinity
                loss = self._loss(outcome, decoded) if outcome.usable else failed
                try:
                    self.optimizer.tell(self._told(candidate, decoded), self._objectives(decoded.levels, loss))
                except unsupported:
                    if candidate is not None:
                        raise
        self._running = []


_ENCODINGS: Sequence[tuple[str, str]] = (
    ("Lengler", "projection"),
    ("Portfolio", "projection"),
    ("Discrete", "keys"),
    ("FastGA", "keys"),
    ("DE", "keys"),
    ("CSEC", "keys"),
    ("CMA", "repaired"),
    ("BO", "native"),  # its model refuses to be told a point twice, and assignments repeat
    ("", "projection"),
)
"""Measured default encoding by what an optimizer's name contains, first match; see ``docs/encodings.md``."""

_TWO_LEVEL_ENCODINGS = {"NGO": "native"}
"""The same where units have two levels only, for those that are to have another one there."""


def encoding_rule(name: str) -> tuple[str, str]:
    """The part of an optimizer's name that decides its default encoding ("" if none does), and the encoding."""
    return next(rule for rule in _ENCODINGS if rule[0] in name)


_OURS = ("EvoPress",)  # registered by searchers.inside.nevergrad_optimizer, the other direction


class NevergradFamily:
    """Every optimizer in Nevergrad's registry that can work here."""

    def members(self) -> tuple[str, ...]:
        """Names after ``nevergrad:``."""
        return tuple(n for n in sorted(load().optimizers.registry) if n not in _OURS and not why_not(n))

    def member(self, name: str) -> type[Searcher]:
        """The searcher class of an optimizer.

        Raises:
            UnknownNameError: Nevergrad has no such optimizer.
            InvalidSettingError: it cannot work here; the message says why.
        """
        if name not in load().optimizers.registry or name in _OURS:
            raise UnknownNameError(f"unknown nevergrad optimizer {name!r}")
        if reason := why_not(name):
            raise InvalidSettingError(f"nevergrad's {name} cannot be used: {reason}")
        return _member(name)


@cache
def _member(name: str) -> type[NevergradSearcher]:
    """One class for each optimizer, so that its settings and defaults can be shown."""
    _, encoding = encoding_rule(name)
    dropped = next((chosen for part, chosen in _TWO_LEVEL_ENCODINGS.items() if part in name), None)
    doc = f"Nevergrad's {name}; default encoding {encoding!r}"
    doc += "." if dropped is None else f", {dropped!r} where units have two levels only."
    attributes = {"optimizer_name": name, "default_encoding": encoding, "two_level_encoding": dropped}
    return type(name, (NevergradSearcher,), {"__doc__": doc, **attributes})


family = NevergradFamily()
