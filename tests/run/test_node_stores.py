"""A node's copy of a level store: made once, whole or not at all, never of another; and a scorer that needs one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evo_hpo.errors import ModelError, StoreError
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.quantizers import RTN
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import LoadedModel
from evo_hpo.run import node_stores
from evo_hpo.run.node_stores import Stock, bring
from evo_hpo.run.scorers import Scorer
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.registry import claims_of, make_problem, prepare_problem
from tests.levels.test_store import read_whole
from tests.scoring.test_task import model_folder, settings
from tests.tiny import tiny_model

__all__ = ["model_folder"]


class Near(Stock):
    """Answers in this process; counts what is read, and may disturb it."""

    def __init__(self, disturb: Callable[[bytes], bytes] = bytes) -> None:
        self.disturb, self.read = disturb, list[tuple[str, int]]()

    def __getattribute__(self, name: str) -> Any:
        if name not in ("manifest", "part"):
            return super().__getattribute__(name)
        return SimpleNamespace(remote=getattr(self, f"_{name}"))

    def _manifest(self, folder: str) -> bytes | None:
        return Stock.manifest(self, folder)

    def _part(self, folder: str, file: str, start: int) -> bytes:
        self.read.append((file, start))
        return self.disturb(Stock.part(self, folder, file, start))


@pytest.fixture(autouse=True)
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are there at once, and files have several parts."""
    monkeypatch.setattr("evo_hpo.run.node_stores.ray.get", lambda answer: answer)
    monkeypatch.setattr(node_stores, "PART", 1000)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver") / "store"
    build_store(LoadedModel.from_model(tiny_model("llama")), folder, RTN([2, 3], group_size=16))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_processes_of_a_node_that_ask_at_the_same_time_make_one_copy(store: Path, tmp_path: Path) -> None:
    stock, here = Near(), tmp_path / "cache" / "store"
    askers = [threading.Thread(target=bring, args=([here], stock, [str(store)])) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert files(here) == files(store)
    sizes = {record.file: record.bytes for record in open_store(store).manifest.units}
    assert sorted(stock.read) == sorted((name, at) for name, size in sizes.items() for at in range(0, size, 1000))
    assert len(stock.read) > len(sizes)


def test_a_copy_that_was_cut_off_goes_on_and_shows_no_store_before_it_is_whole(store: Path, tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def cut(part: bytes) -> bytes:
        if len(stock.read) == 20:
            raise Cut
        return part

    stock = Near(cut)
    with pytest.raises(Cut):
        bring([tmp_path / "s"], stock, [str(store)])
    with pytest.raises(StoreError, match="not finished"):
        open_store(tmp_path / "s")
    whole = {path.name for path in (tmp_path / "s" / "units").glob("*.safetensors")}
    bring([tmp_path / "s"], again := Near(), [str(store)])
    assert whole
    assert not whole & {Path(file).name for file, _ in again.read}
    read_whole(open_store(tmp_path / "s"))


def test_what_comes_damaged_or_lies_there_of_another_store_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"'units/.*' came damaged"):
        bring([tmp_path / "damaged"], Near(lambda part: part[:-1] + b"?"), [str(store)])
    assert not list((tmp_path / "damaged" / "units").glob("*.safetensors"))
    other = LoadedModel.from_model(tiny_model("llama"))
    build_store(other, tmp_path / "other", RTN([2, 4], group_size=16))
    before = files(tmp_path / "other")
    with pytest.raises(StoreError, match="holds another store than the one that is searched: delete it"):
        bring([tmp_path / "other"], Near(), [str(store)])
    (tmp_path / "other" / "manifest.json").unlink()
    with pytest.raises(StoreError, match="holds a store with other settings"):
        bring([tmp_path / "other"], Near(), [str(store)])
    assert files(tmp_path / "other") == {k: v for k, v in before.items() if k != "manifest.json"}
    bring([tmp_path / "none"], Near(), [str(tmp_path / "nowhere")])
    assert not (tmp_path / "none" / "manifest.json").exists()


def test_a_scorer_on_a_node_without_the_store_scores_as_the_driver_would(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "EVO_HPO_THREADS"):
        monkeypatch.setenv(variable, "1")  # as scorers set them
    problem = {k: v for k, v in settings(model_folder, tmp_path).items() if k != "store"} | {"method": "rtn"}
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "driver"))
    prepare_problem("language_model", problem, lambda *_: None)
    theirs = [str(folder) for folder in claims_of("language_model", problem).folders]
    made = make_problem("language_model", **problem)
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "node"))
    calls: list[Any] = [("score", ([(1,) * len(made.space.units)], Minibatch(0, 32)), {}), ("fingerprint", (), {})]
    with pytest.raises(StoreError, match=r"on node .*no level store at .*build one first"):
        Scorer(1).answer("language_model", problem, calls)
    scores, fingerprint = Scorer(1).answer("language_model", problem, calls, (Near(), theirs))
    assert json.dumps(fingerprint, default=str) == json.dumps(made.fingerprint(), default=str)
    assert scores == made.score(*calls[0][1])
    assert [p.name for p in (tmp_path / "node" / "stores").glob("[!.]*")] == [Path(theirs[0]).name]
    with pytest.raises(ModelError, match=r"on node .*: no model '/nowhere'"):
        Scorer(1).answer("language_model", problem | {"model": "/nowhere"}, calls)
