"""Tasks of lm-evaluation-harness on a model that is in memory (extra `lm-eval`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evo_hpo.errors import InvalidSettingError, MissingPackageError
from evo_hpo.models.loading import LoadedModel


@dataclass(frozen=True)
class HarnessTasks:
    """Which tasks, and how.

    Attributes:
        names: of tasks or groups.
        folder: of task files (.yaml) of one's own; only these are known then, and nothing is downloaded.
        limit: examples of each task; None: all.
        batch: sequences in a pass.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    batch: int = 1


def check_tasks(tasks: HarnessTasks) -> Any:
    """The harness's list of tasks, which knows all that are asked for: before any model is loaded.

    Raises:
        MissingPackageError: the harness is not installed.
        InvalidSettingError: it does not know a task, the folder is none, or the limit is below 1.
    """
    if not all(tasks.names):
        raise InvalidSettingError(f"tasks={','.join(tasks.names)!r} must be names separated by commas")
    if tasks.folder is not None and not tasks.folder.is_dir():
        raise InvalidSettingError(f"task_folder={str(tasks.folder)!r} is no folder: name one that holds task files")
    if tasks.limit is not None and tasks.limit < 1:
        raise InvalidSettingError(f"limit={tasks.limit} must be at least 1 example a task, or left out for all")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingPackageError(
            f"tasks need lm-evaluation-harness: pip install 'evo-hpo[lm-eval]' ({error})"
        ) from error
    manager = TaskManager(
        include_path=str(tasks.folder) if tasks.folder else None, include_defaults=tasks.folder is None
    )
    if unknown := [name for name in tasks.names if name not in manager.all_tasks]:
        raise InvalidSettingError(
            f"lm-evaluation-harness has no task {unknown[0]!r}{f' in {tasks.folder}' * bool(tasks.folder)}"
        )
    return manager


def task_scores(loaded: LoadedModel, tasks: HarnessTasks, manager: Any) -> dict[str, float]:
    """ "task/metric" -> value; the harness's standard error stands under "task/metric_stderr".

    Args:
        manager: what :func:`check_tasks` returned.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    device = str(next(loaded.model.parameters()).device)
    model = HFLM(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=tasks.batch, device=device
    )
    found: Any = simple_evaluate(
        model=model, tasks=list(tasks.names), limit=tasks.limit, task_manager=manager, log_samples=False
    )
    return {
        f"{task}/{key.removesuffix(',none').replace(',', ' ')}": float(value)
        for task, values in found["results"].items()
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in key
    }
