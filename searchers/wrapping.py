"""Classes of searchers that run another registered searcher inside, one for each name, with its settings."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from evo_hpo.search.registry import searcher_class
from evo_hpo.search.searcher import Searcher, settings_of
from evo_hpo.space.compression_space import CompressionSpace

__all__ = ["wrapping"]


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

    before = list(inspect.signature(base.__init__).parameters.values())[:-1]
    passed = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=value)
        for key, value in settings_of(inner).items()
        if key not in own
    ]
    start.__signature__ = inspect.Signature([*before, *passed])  # type: ignore[attr-defined]
    found = {"__init__": start, "wrapped": inner, "__doc__": summary, "random": inner.random, **attributes}
    return type(f"{base.__name__}[{name}]", (base,), found)
