"""Settings held against the signature of what takes them, so that a wrong type is told apart from an error inside."""

from __future__ import annotations

import inspect
import numbers
import types
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

from evo_hpo.errors import InvalidSettingError

_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool, np.bool_), "true or false"),
    int: ((numbers.Integral,), "an integer"),
    float: ((numbers.Real,), "a number"),
    str: ((str,), "text"),
    None: ((types.NoneType,), "nothing"),
    types.NoneType: ((types.NoneType,), "nothing"),
}


def annotations_of(target: Callable[..., Any]) -> Mapping[str, Any]:
    """Parameter -> its type, for each whose annotation can be evaluated; of a class, those of its bases too."""
    return _annotations_of_class(target) if isinstance(target, type) else _annotated(target)


@cache
def _annotations_of_class(target: type) -> dict[str, Any]:
    inits = [vars(base)["__init__"] for base in reversed(target.__mro__) if "__init__" in vars(base)]
    return {name: kind for init in inits for name, kind in _annotated(init).items()}


def _annotated(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
    except (NameError, TypeError, ValueError):  # a name that is imported for type checkers only; not in Python
        return {}
    return {p.name: p.annotation for p in parameters if not (p.annotation is p.empty or isinstance(p.annotation, str))}


def check_types(owner: str, known: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises InvalidSettingError for a setting that is not of its type; types that it cannot judge fit."""
    for name, value in settings.items():
        if name in known and not fits(value, known[name]):
            shown = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}..."
            raise InvalidSettingError(f"{owner}: {name}={shown} must be {_words(known[name])}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type; lists are as good as tuples, integers as good as numbers."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin in _PLAIN:
        return isinstance(value, _PLAIN[origin][0]) and (origin is bool or not isinstance(value, bool))
    if not isinstance(origin, type):
        return True
    if issubclass(origin, Mapping):
        pairs = value.items() if isinstance(value, Mapping) else ()
        return isinstance(value, Mapping) and all(
            fits(x, t) for pair in pairs for x, t in zip(pair, inner, strict=False)
        )
    if issubclass(origin, Iterable):
        if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
            return False
        if issubclass(origin, tuple) and inner and inner[-1] is not Ellipsis:
            return len(list(value)) == len(inner) and all(fits(x, t) for x, t in zip(value, inner, strict=True))
        return not inner or all(fits(x, inner[0]) for x in value)
    return True


def _words(kind: Any) -> str:
    """A type as a user may read it."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, inner))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin in _PLAIN:
        return _PLAIN[origin][1]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a table"
    return f"a list ({_words(inner[0])} each)" if inner else "a list"
