"""What is built before searches: side by side where nothing is shared, and no build goes on beside a failed one.

Builds side by side are processes of their own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from evo_hpo.errors import InfeasibleError, StoreError
from evo_hpo.levels.store import open_store
from evo_hpo.run import preparing
from evo_hpo.run.plan import Plan, make_plan
from evo_hpo.run.preparing import prepare
from evo_hpo.scoring.task import language_model
from evo_hpo.search.registry import Claims, claims_of
from tests.run.builds import failing, meeting
from tests.scoring.test_task import model_folder, plan_of, settings

__all__ = ["model_folder"]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """A plan of problems of 8, 9, ... units that claim the devices that they are called after."""

    def of(*devices: str) -> Plan:
        problems = [
            {"name": "additive", "label": f"{n}-{d}", "settings": {"units": 8 + n}} for n, d in enumerate(devices)
        ]
        named = {8 + n: d for n, d in enumerate(devices)}
        claims = lambda name, settings: Claims(tuple(named[settings["units"]].split("+")))  # noqa: E731
        monkeypatch.setattr(preparing, "claims_of", claims)
        searchers = [{"name": "uniform"}]
        return make_plan(
            {"name": "p", "seeds": [0], "budget": {"evaluations": 9}, "problems": problems, "searchers": searchers}
        )

    return of


def test_problems_on_devices_of_their_own_are_built_at_the_same_time(
    plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process each, because to load a model changes what others in the process load at that moment."""
    monkeypatch.chdir(tmp_path)
    heard: list[tuple[Any, ...]] = []
    prepare(plan("a", "b", "b+c", "c"), lambda *counted: heard.append(counted), meeting)
    built = [int(line) for line in Path("built").read_text().split()]
    assert sorted(built) == [8, 9, 10, 11]
    assert [number for number in built if number != 8] == [9, 10, 11]  # these share devices
    assert {key for key, *_ in heard} == {"0-a", "1-b", "2-b+c", "3-c"}
    at = {key: what for key, _, _, what in heard}
    assert at["0-a"] != at["1-b"] == at["2-b+c"] == at["3-c"]
    assert f"layer of {os.getpid()}" not in at.values()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("no room", "no room"),
        ("unexpected", "unexpected"),
        ("strange", "a build failed: Strange: neither pickled"),
        ("killed", r"ended with code -9 \(out of memory\?\): what it wrote is kept; free memory"),
    ],
)
def test_a_build_that_fails_ends_the_others(
    plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("how").write_text(how)
    with pytest.raises(RuntimeError if how == "unexpected" else StoreError, match=told) as raised:
        prepare(plan("a", "b"), lambda *_: None, failing)
    assert ("in failing" in str(raised.value.__cause__)) == (how in ("unexpected", "strange"))
    Path("alive").unlink()
    time.sleep(0.1)
    assert not Path("alive").exists()


def test_nothing_is_built_where_another_problem_cannot_work(model_folder: Path, tmp_path: Path) -> None:
    problem = settings(model_folder, tmp_path / "store")
    data = plan_of(problem).plain()
    data["problems"].append({**data["problems"][0], "label": "wrong", "settings": {**problem, "average": 9.0}})
    with pytest.raises(InfeasibleError, match="average=9.0 bits is outside"):
        prepare(make_plan(data), lambda *_: None)
    assert not (tmp_path / "store").exists()


def test_stores_of_two_problems_are_those_that_are_built_alone(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrated, and on a CPU that claims to be two devices; problems with one store are no reason for two builds."""
    own = {"build": {"group_size": 16, "calibration_tokens": 256, "sequence_length": 16}}

    def problems(where: Path) -> list[dict[str, Any]]:
        first, second = (settings(model_folder, where / name, **own) for name in ("first", "second"))
        second["levels"] = [3, 4]
        return [first, second, {**first, "average": 2.5}]

    for problem in problems(tmp_path / "alone"):
        language_model.prepare(problem, lambda *_: None)
    task = language_model.task(problems(tmp_path)[0])
    assert language_model.claims(problems(tmp_path)[0]) == Claims(("cpu",), (task.store_folder,))
    monkeypatch.setattr(preparing, "claims_of", lambda *given: Claims((), claims_of(*given).folders))
    data = plan_of({}).plain()
    data["problems"] = [
        {"name": "language_model", "label": str(n), "settings": s} for n, s in enumerate(problems(tmp_path / "beside"))
    ]
    done: list[str] = []
    tied = PreTrainedModel.tie_weights
    prepare(make_plan(data), lambda key, *_: done.append(key))
    assert PreTrainedModel.tie_weights is tied  # which loading models beside each other in one process would not leave
    assert set(done) == {"0", "1"}  # the third problem's store is there by then
    for name in ("first", "second"):
        alone, beside = (open_store(tmp_path / where / name) for where in ("alone", "beside"))
        assert alone.fingerprint == beside.fingerprint
