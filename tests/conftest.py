"""A tiny random model and text for it; one thread a process, so that tests in several processes share the cores.

torch is imported where it is used: the process that hands out tests to others needs none of it.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from evo_hpo.models.loading import LoadedModel

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, and of pytest's own workers

MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**32:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # databases and journals wait for no disk


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What tests import stays, so it is never searched for garbage, neither while it grows nor later.

    What they make is searched seldom: with Python's own thresholds that is a twentieth of all their time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(100_000, 20, 100)
        gc.enable()


LONG = ("run", "tracking", "cli", "report")
"""Folders with tests that wait for processes, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first: of two workers none waits for the other's last one, and what a file starts starts once."""
    rank = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def texts_tokenized_once() -> Iterator[None]:
    """What a tokenizer has met it does not split again for a test that has a cache of its own."""
    from evo_hpo.models import text
    from evo_hpo.models.identity import digest, tokenizer_identity

    split = text._tokenize
    known: dict[str, NDArray[np.int32]] = {}

    def once(documents: list[str], tokenizer: object) -> NDArray[np.int32]:
        key = digest([tokenizer_identity(tokenizer), *documents])
        if key not in known:
            known[key] = split(documents, tokenizer)
            known[key].setflags(write=False)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_tokenize", once)
        yield


@pytest.fixture(scope="session", autouse=True)
def memory_given_back(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary folders go at the end and not before, so that no path is used twice; unless a test failed."""
    yield
    if not request.session.testsfailed:
        shutil.rmtree(tmp_path_factory.getbasetemp(), ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def quick_processes() -> Iterator[None]:
    """Processes of searches that tests start here are forked from one that has imported what each would import."""
    from evo_hpo.run import processes
    from tests.forking import Forking

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "PROCESSES", Forking())
        yield


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of reports are made and not drawn, which takes longer than searches do: ``tests/report`` draws them."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from evo_hpo.report import report

    def save(drawn: object, stem: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
        stem.parent.mkdir(parents=True, exist_ok=True)
        paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in formats]
        named = PngInfo()
        named.add_text("Title", stem.name)  # no two pictures are the same
        Image.new("L", (1, 1)).save(paths[0], pnginfo=named)
        return paths

    monkeypatch.setattr(report, "save", save)


@pytest.fixture
def llama() -> LoadedModel:
    from evo_hpo.models.loading import LoadedModel
    from tests.tiny import tiny_model

    return LoadedModel.from_model(tiny_model("llama"), name="tiny llama")


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    from tests.tiny import tiny_tokens

    return tiny_tokens(sequences=20, length=16)


def mixtral() -> LoadedModel:
    from evo_hpo.models.loading import LoadedModel
    from tests.tiny import tiny_mixtral

    return LoadedModel.from_model(tiny_mixtral(), name="tiny mixtral")
