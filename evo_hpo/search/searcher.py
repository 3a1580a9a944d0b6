"""The interface of every search algorithm: ask, tell, recommend.

The loop calls ``ask``, scores the batch, calls ``tell`` with its outcomes, and again. Both are called from one thread,
strictly alternating. A searcher is a deterministic function of its space, seed, settings and the outcomes it was told:
that is what makes a search resumable by replaying its journal.
"""

from __future__ import annotations

import difflib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, TypeVar, cast

import numpy as np

from evo_hpo.errors import InvalidSettingError, UnknownNameError
from evo_hpo.search.budget import Allowance
from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.search.setting_types import annotations_of
from evo_hpo.search.trial import Batch, Draw, Outcome, Probe, Terms, Trial
from evo_hpo.space.compression_space import Assignment, CompressionSpace

S = TypeVar("S", bound="Searcher")


class Searcher(ABC):
    """Base of all searchers. Subclasses take the space and keyword-only settings, all with defaults.

    Attributes:
        space: the space that is searched.
        rng: the searcher's own random stream, a function of the seed alone.
        batch: trials that it asks for at once, where that is a setting.
        stop_reason: why ``ask`` returned nothing.
    """

    random: ClassVar[bool] = True
    """False: the seed changes nothing, one run says all."""
    asks_for_sensitivities: bool = False
    """True: it searches no problem that has none."""
    batch: int = 1
    passes_on_to: ClassVar[type | None] = None
    """What explains settings that it only passes on."""

    def __init__(self, space: CompressionSpace, *, seed: int = 0) -> None:
        self.space = space
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.stop_reason = ""
        self._asked = 0
        self._best: Outcome | None = None

    @abstractmethod
    def ask(self, allowance: Allowance) -> Batch | None:
        """One batch; None ends the search and sets ``stop_reason``.

        A searcher should keep within the allowance; the loop drops trials off the end that it cannot pay.
        """

    @abstractmethod
    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """The outcomes of the batch asked last, in order; fewer where the budget ended inside the batch."""

    def next_probe(self, allowance: Allowance) -> Probe | None:
        """Sensitivities that it wants before it can be asked for the next batch; the loop looks here first."""
        return None

    def learn_sensitivities(self, found: Sensitivities) -> None:
        """What the probe asked last gave; only searchers that ask for probes are told."""
        raise NotImplementedError(f"{type(self).__name__} asks for no sensitivities")

    def recommend(self) -> Assignment | None:
        """The assignment to take if the search ended now; None before the first outcome.

        By default the least loss among complete trials of the largest fidelity, which compares fairly only where all
        trials see the same data; searchers on fresh minibatches say what their incumbent is.
        """
        return None if self._best is None else self._best.trial.levels

    def front(self) -> Iterable[Assignment] | None:
        """Over a range of budgets, the assignments to take: at each budget the dearest that fits; in any order.

        None, the default: of all trials on the most tokens, those that lose less than all cheaper ones.
        """
        return None

    def fidelities(self) -> tuple[int | None, ...]:
        """Calibration tokens of every batch that it may ask for, as far as known; None: the problem's default.

        A plan is refused before any work where the problem cannot draw one of them.
        """
        return (None,)

    def check_sensitivities(self, problem: str, there: bool) -> None:
        """Refuses a problem that has none, where this searcher asks for them.

        Raises:
            InvalidSettingError: with the problem's name.
        """
        if self.asks_for_sensitivities and not there:
            raise InvalidSettingError(
                f"{type(self).__name__} asks for sensitivities, problem {problem!r} has none:"
                " take another searcher, or settings that ask for none"
            )

    # ------------------------------------------------------------------ for subclasses

    def trial(self, levels: Sequence[int], parent: int | None = None, note: str = "") -> Trial:
        """The next trial, numbered."""
        self._asked += 1
        return Trial(self._asked - 1, tuple(levels), parent, note)

    def propose(self, assignments: Iterable[Sequence[int]], *, note: str = "", **terms: Any) -> Batch:
        """A batch of these assignments as the next trials; ``terms`` as in :class:`evo_hpo.search.trial.Terms`."""
        return Batch(tuple([self.trial(levels, note=note) for levels in assignments]), Terms(**terms))

    def remember(self, outcomes: Sequence[Outcome]) -> None:
        """Keeps the best outcome for the default ``recommend``."""
        for outcome in outcomes:
            if outcome.usable and (self._best is None or self._rank(outcome) < self._rank(self._best)):
                self._best = outcome

    @staticmethod
    def _rank(outcome: Outcome) -> tuple[int, float]:
        return -outcome.tokens, outcome.loss


@cache
def settings_of(cls: type) -> Mapping[str, Any]:
    """Settings (keyword-only parameters but the seed) of a searcher class with their defaults, own class first."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        for p in parameters:
            if p.kind is p.KEYWORD_ONLY and p.name != "seed":
                found.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def passes_on(inner: type, own: Sequence[str] = ()) -> Callable[[type[S]], type[S]]:
    """Names a searcher's ``**settings``, which it passes on to ``inner``; without those that are its ``own``."""

    def named(cls: type[S]) -> type[S]:
        before = list(inspect.signature(cls.__init__).parameters.values())[:-1]
        kinds = annotations_of(inner)
        passed = [
            inspect.Parameter(
                key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds.get(key, Any) | None
            )
            for key, default in settings_of(inner).items()
            if key not in (*own, *(p.name for p in before))
        ]
        cls.__init__.__signature__ = inspect.Signature([*before, *passed])  # type: ignore[attr-defined]
        cls.passes_on_to = inner
        return cls

    return named


def check_settings(owner: str, known: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises UnknownNameError for a setting that the owner, a searcher or problem, does not have."""
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UnknownNameError(
                f"{owner} has no setting {key!r}{hint}; it has: {', '.join(sorted(known)) or 'none'}"
            )


MANY = 100_000
"""Most assignments that a searcher may be told to hold or to ask for at once."""


def positive(name: str, value: int, least: int = 1, most: float = math.inf) -> int:
    """``value`` as an integer of at least ``least`` and at most ``most``.

    Raises:
        InvalidSettingError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InvalidSettingError(f"{name}={value!r} must be an integer of at least {least}")
    if value > most:
        raise InvalidSettingError(f"{name}={value!r} must be at most {most}")
    return int(value)


def boolean(name: str, value: bool) -> bool:
    """``value`` where it is a truth value; text such as "False" is not.

    Raises:
        InvalidSettingError: it is something else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidSettingError(f"{name}={value!r} must be true or false")
    return bool(value)


def number(name: str, value: float, *, zero: bool = False) -> float:
    """``value`` where it is a finite number above 0, or with ``zero`` of at least 0.

    Raises:
        InvalidSettingError: it is something else.
    """
    known = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not (known and math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise InvalidSettingError(f"{name}={value!r} must be a number {'of at least' if zero else 'above'} 0")
    return float(value)


def probability(name: str, value: float) -> float:
    """``value`` where it is a number from 0 to 1.

    Raises:
        InvalidSettingError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
        raise InvalidSettingError(f"{name}={value!r} must be a probability, 0 to 1")
    return float(value)


def one_of(name: str, value: str, *allowed: str) -> str:
    """``value`` where it is one of those allowed.

    Raises:
        InvalidSettingError: it is not.
    """
    if value not in allowed:
        raise InvalidSettingError(f"{name}={value!r} must be one of: {', '.join(allowed)}")
    return value


def draw(name: str, value: str) -> Draw:
    """``value`` as the minibatch rule of a searcher whose trials all have one fidelity: ``fixed`` or ``fresh``.

    Raises:
        InvalidSettingError: another rule.
    """
    if value not in ("fixed", "fresh"):
        raise InvalidSettingError(f"{name}={value!r} must be fixed or fresh")
    return cast(Draw, value)
