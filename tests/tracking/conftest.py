"""Small searches with journals, and a store made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from evo_hpo import Budget, CompressionSpace, FunctionProblem, Outcome, SearchResult, Terms, Trial, Unit
from evo_hpo.record.journal import Journal, search_header
from evo_hpo.search.loop import Checkpoint

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """MLflow's own deprecated calls are not this project's warnings."""
    for item in items:
        if HERE in item.path.parents:
            for source in ("sqlalchemy", "mlflow", "alembic", "pydantic", "starlette"):
                item.add_marker(pytest.mark.filterwarnings(rf"ignore::DeprecationWarning:{source}(\..*)?"))
            item.add_marker(pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"))


class Script:
    """A search whose outcomes are given: writes its journal piece by piece."""

    def __init__(self, path: Path, *, units: int = 5, seed: int = 0, **more: Any) -> None:
        space = CompressionSpace([Unit(f"model.layers.{i}.proj", (2, 3, 4)) for i in range(units)], 3 * units)
        self.problem = FunctionProblem(space, lambda levels: 0.0)
        header = search_header(path.stem, "script", self.problem, Budget(evaluations=99), seed=seed, **more)
        self.header = {**header, "created": 1_000_000.0 + seed}
        self.path = path
        self.count = 0

    def write(
        self,
        losses: Sequence[float] = (),
        *,
        end: bool = False,
        checkpoint: bool = False,
        more_held_out: Mapping[str, float] = {},
        **fields: Any,
    ) -> Script:
        """Appends a batch of trials with these losses, then a checkpoint, then the end."""
        levels = self.problem.space.uniform()
        with Journal.open(self.path, self.header, resume=True) as journal:
            outcomes = []
            for loss in losses:
                trial = Trial(self.count, levels, parent=self.count - 1 or None, **fields)
                terms = Terms(generation=self.count // 3)
                status: Any = "complete" if abs(loss) < float("inf") else "failed"
                reason = "" if status == "complete" else "broke"
                outcomes.append(Outcome(trial, loss, 100, 0.25, 7, status, reason, terms))
                self.count += 1
            if outcomes:
                journal.record(outcomes)
            if checkpoint:
                held_out = {"loss": 0.5, "perplexity": 12.5, **more_held_out}
                journal.record_checkpoint(Checkpoint(0.5, 100 * self.count, self.count, 1.0, levels, held_out))
            if end:
                journal.finish(SearchResult(levels, 0.5, seconds=3.0, searcher_seconds=0.5, stop_reason="done"))
        return self


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with tables and nothing in it: making one takes seconds, copying it does not."""
    from evo_hpo.tracking.mlflow_store import prepare_store

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    prepare_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Path:
    """An ``mlruns`` folder with an empty store."""
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_store, tmp_path / "mlruns" / "mlflow.db")
    return tmp_path / "mlruns"


@pytest.fixture
def uri(root: Path) -> str:
    return f"sqlite:///{root / 'mlflow.db'}"


@pytest.fixture
def folder(root: Path) -> Path:
    """A comparison's folder with one finished and one unfinished search."""
    folder = root / "comparisons" / "small"
    Script(folder / "journals" / "good-s0.jsonl").write([3.0, 2.0, float("inf")]).write(
        [1.0, 0.5], end=True, checkpoint=True
    )
    Script(folder / "journals" / "cut-s1.jsonl", seed=1).write([5.0])
    return folder


Runs = Callable[..., list[Any]]


@pytest.fixture
def runs(uri: str) -> Runs:
    """Runs of the store as MLflow itself gives them."""
    from mlflow import MlflowClient

    def found(where: str = "", order: str = "attributes.start_time ASC") -> list[Any]:
        client = MlflowClient(tracking_uri=uri)
        ids = [e.experiment_id for e in client.search_experiments()]
        return list(client.search_runs(ids, where, max_results=5000, order_by=[order]))

    return found
