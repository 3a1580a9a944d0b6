"""Searchers that run another searcher inside, with its settings among their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from evo_hpo.search.registry import searcher_class
from evo_hpo.search.searcher import Searcher, settings_of
from evo_hpo.space.compression_space import CompressionSpace

__all__ = ["passes_on", "wrapping"]

S = TypeVar("S", bound=Searcher)


def passes_on(inner: type[Searcher], own: Sequence[str] = ()) -> Callable[[type[S]], type[S]]:
    """Names a searcher's ``**settings``, which it passes on to ``inner``; without those that are its ``own``."""

    def named(cls: type[S]) -> type[S]:
        before = list(inspect.signature(cls.__init__).parameters.values())[:-1]
        passed = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=value)
            for key, value in settings_of(inner).items()
            if key not in (*own, *(p.name for p in before))
        ]
        cls.__init__.__signature__ = inspect.Signature([*before, *passed])  # type: ignore[attr-defined]
        return cls

    return named


def wrapping(base: type[Searcher], name: str, own: Sequence[str], summary: str, **attributes: Any) -> type[Searcher]:
    """A subclass of ``base`` around the searcher ``name``, which is its class attribute ``wrapped``.

    Args:
        base: takes its own settings and passes on all others.
        own: settings of the inner searcher that ``base`` decides.
        summary: its docstring.
        attributes: further ones of the class.
    """
    inner = searcher_class(name)

    def start(self: Searcher, space: CompressionSpace, *, seed: int = 0, **settings: Any) -> None:
        base.__init__(self, space, seed=seed, **settings)

    start.__signature__ = inspect.signature(base.__init__)  # type: ignore[attr-defined]
    found = {"__init__": start, "wrapped": inner, "__doc__": summary, "random": inner.random, **attributes}
    return passes_on(inner, own)(type(f"{base.__name__}[{name}]", (base,), found))
