"""What runs on the CPU, run on a GPU: losses, sensitivities, builds, and a search that is taken up again.

Skipped where there is no GPU. `python -m pytest tests/scoring/test_gpu.py` needs a torch with CUDA and about a minute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evo_hpo import Budget, search
from evo_hpo.levels.build import build
from evo_hpo.levels.store import LevelStore
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.language_model_problem import LanguageModelProblem
from evo_hpo.scoring.task import LanguageModelTask
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.registry import make_searcher
from tests.scoring.evaluators import LENGTH, losses_of
from tests.tiny import ARCHITECTURES, random_assignments, save_tiny, tiny_model, tiny_tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MINIBATCH = Minibatch(seed=3, tokens=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and text of its own."""
    made = tmp_path_factory.mktemp("gpu")
    save_tiny(made / "model", spread=0.25)
    return made


def problem(folder: Path, **settings: Any) -> LanguageModelProblem:
    """The tiny model with levels of 2, 3 and 8 bits, in float32 unless the settings say otherwise."""
    given: dict[str, Any] = {
        "model": str(folder / "model"),
        "method": "rtn",
        "levels": [2, 3, 8],
        "build": {"group_size": 16},
        "store": str(folder / "rtn"),
        "dtype": "float32",
        "sequence_length": 16,
        "calibration_tokens": 256,
        "held_out_tokens": 64,
        "tokens": 64,
        "device": "cuda",
        **settings,
    }
    task = LanguageModelTask(**given)
    task.ensure_store(lambda *_: None)
    return task.make()


def losses(own: LanguageModelProblem, count: int = 5) -> list[float]:
    """Of the same random assignments, all read to the end."""
    return [s.loss for s in own.score(random_assignments(count, len(own.space.units), 3), MINIBATCH)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", ARCHITECTURES[name](), spread=0.25)
    build(str(tmp_path / "model"), tmp_path / "store", method="rtn", levels=[2, 3, 8], group_size=16)

    def found(device: str) -> list[float]:
        store = LevelStore.open(tmp_path / "store", device=device)
        model, tokens = tiny_model(name).to(device), tiny_tokens(length=LENGTH).to(device)
        evaluator = Evaluator(model, store, tokens, threads=1)
        return losses_of(evaluator, random_assignments(5, len(store.units), 3))

    assert found("cuda") == pytest.approx(found("cpu"), rel=1e-4)


@pytest.mark.parametrize("settings", [{"memory": "packed"}, {"memory": "streamed"}, {"devices": ["cuda:0", "cuda:0"]}])
def test_where_blocks_and_levels_wait_changes_no_bit(folder: Path, settings: dict[str, Any]) -> None:
    placed = {"device": "cpu"} if "devices" in settings else {}
    assert losses(problem(folder, **settings, **placed)) == losses(problem(folder))


def test_blocks_on_the_gpu_and_on_the_cpu(folder: Path) -> None:
    spread = problem(folder, device="cpu", devices=["cuda:0", "cpu"])
    assert losses(spread) == pytest.approx(losses(problem(folder, device="cpu")), rel=1e-4)


def test_a_loss_does_not_depend_on_company(folder: Path) -> None:
    together = problem(folder)
    at = random_assignments(5, len(together.space.units), 3)
    alone = [problem(folder).score([one], MINIBATCH)[0].loss for one in at]
    assert [s.loss for s in together.score(at, MINIBATCH)] == alone


@pytest.mark.parametrize("kind", ["true", "kl", "sampled"])
@pytest.mark.parametrize("form", ["inner", "output", "trace"])
def test_sensitivities_are_those_of_the_cpu(folder: Path, kind: Any, form: Any) -> None:
    there, here = problem(folder), problem(folder, device="cpu")
    at = random_assignments(1, len(here.space.units), 3)[0]
    reference = at if kind == "kl" else None
    found, expected = (own.sensitivities(reference, MINIBATCH, kind=kind, form=form) for own in (there, here))
    if kind == "sampled":  # labels come from the device's own generator
        assert np.isfinite(found.projections).all()
        again = problem(folder).sensitivities(reference, MINIBATCH, kind=kind, form=form)
        assert (again.projections == found.projections).all()
        return
    np.testing.assert_allclose(found.projections, expected.projections, atol=2e-4 * np.abs(expected.projections).max())
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("form", ["inner", "output", "trace"])
def test_rows_of_a_layer_add_up(folder: Path, monkeypatch: pytest.MonkeyPatch, form: Any) -> None:
    expected = problem(folder, device="cpu").sensitivities(None, MINIBATCH, kind="true", form=form)
    monkeypatch.setattr("evo_hpo.scoring.weight_changes.ELEMENTS_ELSEWHERE", 4096)
    found = problem(folder).sensitivities(None, MINIBATCH, kind="true", form=form)
    np.testing.assert_allclose(found.projections, expected.projections, atol=2e-4 * np.abs(expected.projections).max())


def test_sensitivities_in_bfloat16_are_near_those_in_single_precision(folder: Path) -> None:
    rough, fine = (
        problem(folder, dtype=d).sensitivities(None, MINIBATCH, kind="true").effects() for d in ("bfloat16", "float32")
    )
    assert np.corrcoef(rough.ravel(), fine.ravel())[0, 1] > 0.98


def test_layers_of_16_bits_are_taken_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch, taken_together: list[int]
) -> None:
    found = problem(folder, dtype="bfloat16").sensitivities(None, MINIBATCH, kind="true").projections
    assert max(taken_together) > 1
    monkeypatch.setattr("evo_hpo.scoring.projections.are_taken_together", lambda _: False)
    alone = problem(folder, dtype="bfloat16").sensitivities(None, MINIBATCH, kind="true").projections
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-2 * np.abs(alone).max())


def test_sensitivities_where_blocks_are_streamed(folder: Path) -> None:
    found, expected = (problem(folder, memory=m).sensitivities(None, MINIBATCH) for m in ("streamed", "resident"))
    np.testing.assert_allclose(found.projections, expected.projections, atol=2e-4 * np.abs(expected.projections).max())


@pytest.mark.parametrize(
    ("method", "levels"), [("gptq", [2, 4]), ("sparsegpt", [0.5, 0.8]), ("wanda", [0.5]), ("rtn", [3])]
)
def test_a_store_that_is_built_on_a_gpu(folder: Path, tmp_path: Path, method: str, levels: list[Any]) -> None:
    settings: dict[str, Any] = {"calibration_tokens": 1024, "sequence_length": 16}
    if method in ("gptq", "rtn"):
        settings["group_size"] = 16
    errors = []
    for device in ("cuda", "cpu"):
        build(str(folder / "model"), tmp_path / device, method=method, levels=levels, device=device, **settings)
        errors.append(np.array(LevelStore.open(tmp_path / device).errors))
    np.testing.assert_allclose(errors[0], errors[1], rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("name", ["evopress", "trust_region", "curvature_region"])
def test_a_search_takes_the_same_trials_again(folder: Path, name: str) -> None:
    def trials() -> list[tuple[Any, float]]:
        own = problem(folder, average=3.0)
        result = search(make_searcher(name, own.space, seed=1), own, budget=Budget(tokens=6000), seed=1)
        return [(outcome.trial.levels, outcome.loss) for outcome in result.outcomes]

    first = trials()
    assert first == trials()
    assert len(first) > 5
