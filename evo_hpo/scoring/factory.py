"""A problem from the settings of a plan: checked, previewed and prepared before it is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.build import check_settings
from evo_hpo.scoring.recipes import beside
from evo_hpo.search.registry import Claims, Preview

T = TypeVar("T", bound=Any)


class Factory(Generic[T]):
    """Makes a task's problem from keyword settings.

    Args:
        task: class of the task; its docstring explains the settings.
        summary: what the problem is.
        defaults: other ones than the task's own.
    """

    def __init__(self, task: type[T], summary: str, **defaults: Any) -> None:
        self.__doc__ = summary
        self.documented_by = task
        self.defaults = defaults
        taken = inspect.signature(task, eval_str=True).parameters.values()
        self.__signature__ = inspect.Signature(
            [p.replace(kind=p.KEYWORD_ONLY, default=defaults.get(p.name, p.default)) for p in taken]
        )

    def task(self, settings: dict[str, Any]) -> T:
        """The task with these settings; the levels and build settings that are usual are those of bit-widths.

        Raises:
            InvalidSettingError: a required setting is missing or out of range.
        """
        other = settings.get("method", "gptq") not in ("gptq", "rtn")
        chosen = {**self.defaults, **({"levels": (), "build": ()} if other else {}), **settings}
        if "model" not in chosen:
            raise InvalidSettingError("setting 'model' is required: a hub id, a folder, a .gguf file or pypi:<package>")
        made: T = self.documented_by(**chosen)
        return made

    def __call__(self, **settings: Any) -> Any:
        return self.task(settings).make()

    def preview(self, settings: dict[str, Any]) -> Preview:
        """The settings checked, and a stand-in for the space."""
        task = self.task(settings)
        for one in (task, *beside(task)):
            check_settings(one.method, one.levels or None, dict(one.build))
        return Preview(task.stand_in(), task.tokens, task.check_minibatch, task.model, has_sensitivities=True)

    def claims(self, settings: dict[str, Any]) -> Claims:
        """The devices that its store is built on, and its stores."""
        task = self.task(settings)
        names = tuple("cuda:0" if name == "cuda" else name for name in task.builders)
        return Claims(names, tuple(one.store_folder for one in (task, *beside(task))))

    def settle(self, settings: dict[str, Any], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
        """The dtype that ``auto`` chose when the fingerprint was recorded, also on another machine, or chooses now."""
        task = self.task(settings)
        if task.dtype != "auto":
            return {}
        recorded = dict(fingerprint.get("identity") or {}).get("dtype")
        return {"dtype": recorded or task.settled_dtype}

    def prepare(self, settings: dict[str, Any], progress: Callable[..., None]) -> None:
        """Builds the level store where it is missing."""
        self.task(settings).ensure_store(progress)
