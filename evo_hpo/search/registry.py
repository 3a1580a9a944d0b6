"""Searchers and problems by name, found through the entry-point groups ``evo_hpo.searchers`` and ``evo_hpo.problems``.

A searcher's entry point is a :class:`Searcher` class, or a :class:`Family` whose members are named
``family:member`` (``optuna:tpe``). A problem's entry point is a function that takes keyword settings and returns a
:class:`Problem`. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from evo_hpo.errors import EvoHpoError, InvalidSettingError, UnknownNameError
from evo_hpo.search.problem import Problem
from evo_hpo.search.searcher import Searcher, check_settings, settings_of
from evo_hpo.search.setting_types import annotations_of, check_types
from evo_hpo.space.compression_space import CompressionSpace


@dataclass(frozen=True)
class Description:
    """What a name stands for: a one-line summary, its settings with defaults and meanings, and whether seeds matter."""

    name: str
    summary: str
    settings: dict[str, Any]
    random: bool = True
    meanings: dict[str, str] = field(default_factory=dict)


@runtime_checkable
class Family(Protocol):
    """Many searchers of one library under one prefix."""

    def members(self) -> tuple[str, ...]:
        """Names after the colon."""

    def member(self, name: str) -> type[Searcher]:
        """The searcher class of a member, or UnknownNameError."""


@dataclass(frozen=True)
class Preview:
    """What can be checked of a problem before it is built.

    Attributes:
        space: its space, or a small stand-in with the same levels.
        tokens: calibration tokens of a trial that names none; 0: the problem has no fidelity.
        check: raises an EvoHpoError when a minibatch of so many tokens cannot be drawn.
        name: of the problem, for errors.
        has_sensitivities: see :class:`evo_hpo.search.problem.Problem`.
    """

    space: CompressionSpace
    tokens: int
    check: Callable[[int], None]
    name: str
    has_sensitivities: bool


@dataclass(frozen=True)
class Claims:
    """What a problem is built with and made from.

    Attributes:
        devices: names of those that work on it while it is built.
        folders: level stores, that are built or must be there.
    """

    devices: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()


@runtime_checkable
class Prepared(Protocol):
    """A problem's factory that has something to build (a level store) before the problem can be made."""

    def preview(self, settings: dict[str, Any]) -> Preview:
        """What can be checked without building; raises an EvoHpoError for settings that cannot work."""

    def claims(self, settings: dict[str, Any]) -> Claims:
        """What building it takes on this machine."""

    def settle(self, settings: dict[str, Any], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
        """What the settings leave to the machine: as this fingerprint recorded it, else settled now."""

    def prepare(self, settings: dict[str, Any], progress: Callable[..., None]) -> None:
        """Builds what is missing."""


@cache
def _entries(group: str) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        if entry.name in found and found[entry.name].value != entry.value:
            raise InvalidSettingError(
                f"two packages register {entry.name!r} in {group}: {found[entry.name].value} and {entry.value};"
                " uninstall one of them"
            )
        found[entry.name] = entry
    return dict(sorted(found.items()))


def unknown(kind: str, name: str, known: tuple[str, ...]) -> UnknownNameError:
    """The error for a name that is none of those known, which says what was meant."""
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    shown = [k for k in known if ":" not in k] if len(known) > 40 else known
    prefix = name.partition(":")[0]
    where = f"known: {', '.join(shown)} (see `evo-hpo list`)" if shown else f"`evo-hpo list {prefix}` shows all"
    return UnknownNameError(f"unknown {kind} {name!r}; {hint}{where}")


def available_searchers() -> tuple[str, ...]:
    """Names of all searchers, members of families included."""
    names: list[str] = []
    for name, entry in _entries("evo_hpo.searchers").items():
        try:
            target = entry.load()
        except ImportError:  # a plugin that is broken or lacks a package must not hide the others
            names.append(name)
            continue
        names += [name] if isinstance(target, type) else [f"{name}:{m}" for m in target.members()]
    return tuple(names)


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except ImportError as error:
        raise InvalidSettingError(f"{entry.name!r} ({entry.value}) cannot be loaded: {error}") from error


def searcher_class(name: str) -> type[Searcher]:
    """The class behind a searcher's name.

    Raises:
        UnknownNameError: no such searcher; the message names near matches.
    """
    prefix, _, member = name.partition(":")
    entry = _entries("evo_hpo.searchers").get(prefix)
    if entry is None:
        raise unknown("searcher", name, tuple(_entries("evo_hpo.searchers")))
    target = _load(entry)
    if isinstance(target, type) and issubclass(target, Searcher):
        if member:
            raise unknown("searcher", name, available_searchers())
        return target
    try:
        found: type[Searcher] = target.member(member)
    except UnknownNameError:
        raise unknown("searcher", name, tuple(f"{prefix}:{m}" for m in target.members())) from None
    return found


def make_searcher(name: str, space: CompressionSpace, *, seed: int = 0, **settings: Any) -> Searcher:
    """A searcher by name, on a space, with its settings.

    Raises:
        UnknownNameError: no such searcher or setting.
        InvalidSettingError: a setting outside its range.
    """
    cls = searcher_class(name)
    owner = f"searcher {name!r}"
    check_settings(owner, settings_of(cls), settings)
    with signature_kept(owner, cls, space, seed=seed, **settings):
        return cls(space, seed=seed, **settings)


@cache
def _signature(cls: type) -> inspect.Signature:
    return inspect.signature(cls)


@contextmanager
def signature_kept(owner: str, target: Callable[..., Any], *given: Any, **settings: Any) -> Iterator[None]:
    """Tells settings that a signature does not allow, the user's fault, from whatever else is raised inside of a call.

    Raises:
        InvalidSettingError: a required setting is missing, or one is not of its type: said only after the call, which
            may know better what it allows.
    """
    try:
        (_signature(target) if isinstance(target, type) else inspect.signature(target)).bind(*given, **settings)
    except TypeError as error:
        raise InvalidSettingError(f"{owner}: {error}") from None
    try:
        yield
    except EvoHpoError:
        raise
    except Exception:
        check_types(owner, annotations_of(target), settings)
        raise
    check_types(owner, annotations_of(target), settings)


def describe_searcher(name: str) -> Description:
    """Summary and settings of a searcher."""
    cls = searcher_class(name)
    return Description(name, _summary(cls), dict(settings_of(cls)), cls.random, _explained(cls))


def _explained(cls: type) -> dict[str, str]:
    """What the docstrings say of settings: of a class, of its bases, and of what they pass settings on to."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        inner = vars(base).get("passes_on_to")
        found |= (_explained(inner) if inner else {}) | _meanings(base)
    return found


def _summary(target: object) -> str:
    return (inspect.getdoc(target) or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")


def _meanings(target: object) -> dict[str, str]:
    """What the docstring says about each argument, in its section ``Args:`` or ``Attributes:``."""
    section = re.search(
        r"(?ms)^(?:Args|Attributes):\n(.*?)(?=^\S|\Z)", inspect.cleandoc(getattr(target, "__doc__", None) or "")
    )
    entries = re.findall(r"(?ms)^    ([\w, ]+): (.*?)(?=^    \w|\Z)", section[1]) if section else []
    return {name: " ".join(text.split()).replace("``", "`") for names, text in entries for name in names.split(", ")}


def available_problems() -> tuple[str, ...]:
    """Names of all problems."""
    return tuple(_entries("evo_hpo.problems"))


def problem_factory(name: str) -> Callable[..., Problem]:
    """The function behind a problem's name.

    Raises:
        UnknownNameError: no such problem; the message names near matches.
    """
    entry = _entries("evo_hpo.problems").get(name)
    if entry is None:
        raise unknown("problem", name, available_problems())
    factory: Callable[..., Problem] = _load(entry)
    return factory


def make_problem(name: str, **settings: Any) -> Problem:
    """A problem by name with its settings.

    Raises:
        UnknownNameError: no such problem or setting.
    """
    factory = problem_factory(name)
    owner = f"problem {name!r}"
    check_settings(owner, _parameters(factory), settings)
    with signature_kept(owner, factory, **settings):
        return factory(**settings)


def preview_problem(name: str, settings: dict[str, Any]) -> Preview:
    """What a problem says of itself before anything is built; one that has nothing to build is simply made."""
    factory: object = problem_factory(name)
    if isinstance(factory, Prepared):
        with signature_kept(f"problem {name!r}", problem_factory(name), **settings):
            return factory.preview(settings)
    made = make_problem(name, **settings)
    return Preview(made.space, made.tokens, made.check, made.name, made.has_sensitivities)


def prepare_problem(name: str, settings: dict[str, Any], progress: Callable[..., None]) -> None:
    """Lets a problem build what it needs, once, before searches start."""
    factory: object = problem_factory(name)
    if isinstance(factory, Prepared):
        factory.prepare(settings, progress)


def claims_of(name: str, settings: dict[str, Any]) -> Claims:
    """What a problem is built with and made from; nothing where it has nothing to build."""
    factory: object = problem_factory(name)
    return factory.claims(settings) if isinstance(factory, Prepared) else Claims()


def settled(name: str, settings: dict[str, Any], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings leave to the machine, such as a dtype, to be used by all that make the problem.

    As it was chosen when the fingerprint was recorded, or else settled now; empty where they leave nothing.
    """
    factory: object = problem_factory(name)
    return factory.settle(settings, fingerprint) if isinstance(factory, Prepared) else {}


def describe_problem(name: str) -> Description:
    """Summary and settings of a problem; its module's docstring may explain those that several factories share."""
    factory = problem_factory(name)
    meanings = _meanings(sys.modules[factory.__module__]) | _meanings(getattr(factory, "documented_by", factory))
    return Description(name, _summary(factory), _parameters(factory), meanings=meanings)


def _parameters(factory: Callable[..., Problem]) -> dict[str, Any]:
    return {p.name: p.default for p in inspect.signature(factory).parameters.values()}
