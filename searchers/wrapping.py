"""Searchers that run another searcher inside, with its settings among their own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from evo_hpo.errors import UnknownNameError
from evo_hpo.search.registry import searcher_class
from evo_hpo.search.searcher import Searcher, passes_on
from evo_hpo.space.compression_space import CompressionSpace


class WrappingFamily:
    """``PREFIX:NAME``: a searcher around any searcher NAME, which is its class attribute ``wrapped``.

    Args:
        base: the searcher; takes its own settings and passes on all others.
        own: settings of the inner searcher that ``base`` decides.
        summary: docstring of a member, with {} for the inner searcher.
        listed: names to show; others work too.
        attributes: further ones of a member.
    """

    def __init__(
        self,
        prefix: str,
        base: type[Searcher],
        own: Sequence[str],
        summary: str,
        listed: tuple[str, ...],
        **attributes: Any,
    ) -> None:
        self.prefix, self.base, self.own, self.summary, self.listed = prefix, base, own, summary, listed
        self.attributes = attributes
        self._made: dict[str, type[Searcher]] = {}

    def members(self) -> tuple[str, ...]:
        """Some of ours."""
        return self.listed

    def member(self, name: str) -> type[Searcher]:
        """The class around a searcher, the same one each time.

        Raises:
            UnknownNameError: no such searcher, or it is of this family itself.
        """
        if name.partition(":")[0] == self.prefix:
            raise UnknownNameError(f"{self.prefix} cannot wrap {name!r}: it is {self.prefix} already")
        if name not in self._made:
            self._made[name] = self._around(name, searcher_class(name))
        return self._made[name]

    def _around(self, name: str, inner: type[Searcher]) -> type[Searcher]:
        base = self.base

        def start(self: Searcher, space: CompressionSpace, *, seed: int = 0, **settings: Any) -> None:
            base.__init__(self, space, seed=seed, **settings)

        start.__signature__ = inspect.signature(base.__init__)  # type: ignore[attr-defined]
        found = {"__init__": start, "wrapped": inner, "__doc__": self.summary.format(name), "random": inner.random}
        return passes_on(inner, self.own)(type(f"{base.__name__}[{name}]", (base,), found | self.attributes))
