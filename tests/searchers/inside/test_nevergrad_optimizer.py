"""EvoPress inside Nevergrad: registered, on ordinary parametrizations, with and without a budget."""

from __future__ import annotations

import itertools
import multiprocessing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evo_hpo.errors import InvalidSettingError, InvalidSpaceError
from searchers.foreign.nevergrad_adapter import load

ng = load()

from searchers.inside.nevergrad_optimizer import ConfiguredEvoPress  # noqa: E402

COSTS = [(2, 3, 4, 8)] * 6 + [(10, 20)]
BUDGET = 40
WEIGHTS = np.random.default_rng(1).gamma(1.0, 1.0, len(COSTS))


@pytest.fixture(autouse=True)
def _librarys_own_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="nevergrad")
        yield


def levels_array(seed: int = 0) -> Any:
    array = ng.p.Array(init=np.zeros(7)).set_bounds(0, np.array([3] * 6 + [1])).set_integer_casting()
    array.random_state = np.random.RandomState(seed)
    return array


def cost(levels: Any) -> int:
    return sum(c[k] for c, k in zip(COSTS, levels, strict=True))


def loss(levels: Any) -> float:
    return float(sum(w / c[k] for w, c, k in zip(WEIGHTS, COSTS, levels, strict=True)))


def search(seed: int = 0, trials: int = 400, workers: int = 1, **settings: Any) -> list[tuple[int, ...]]:
    configured = ConfiguredEvoPress(costs=COSTS, cost_budget=BUDGET, offspring=8, **settings)
    optimizer = configured(levels_array(seed), budget=trials, num_workers=workers)
    seen = []
    for _ in range(trials // workers):
        batch = [optimizer.ask() for _ in range(workers)]
        for candidate in batch:
            seen.append(tuple(int(k) for k in candidate.value))
            optimizer.tell(candidate, loss(candidate.value))
    return seen


@pytest.mark.parametrize("workers", [1, 5])
def test_no_candidate_is_over_the_budget_and_the_optimum_is_found(workers: int) -> None:
    seen = search(workers=workers)
    assert max(map(cost, seen)) <= BUDGET
    feasible = (a for a in itertools.product(*(range(len(c)) for c in COSTS)) if cost(a) <= BUDGET)
    assert min(map(loss, seen)) == pytest.approx(min(map(loss, feasible)))


def test_a_first_value_that_leaves_budget_does_not_hold_the_search_there() -> None:
    array = ng.p.Array(init=np.zeros(12)).set_bounds(0, 2).set_integer_casting()
    optimizer = ConfiguredEvoPress(costs=[(2, 3, 4)] * 12, cost_budget=36)(array, budget=100)
    seen = []
    for _ in range(100):
        candidate = optimizer.ask()
        seen.append(tuple(map(int, candidate.value)))
        optimizer.tell(candidate, float(sum((i + 1) / (2 + k) for i, k in enumerate(seen[-1]))))
    assert len(set(seen)) == 100
    assert max(map(sum, seen)) == 12


def test_exact_losses_are_never_asked_for_twice_and_noisy_ones_are() -> None:
    assert len(set(search(1, 150))) == 150
    assert len(set(search(1, 150, noisy=True))) < 150


def test_same_seed_same_candidates_in_a_spawned_process_and_another_seed_differs() -> None:
    here = search(3, 60)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(search, (3, 60)) == here
    assert search(4, 60) != here


def test_registered_and_minimises_an_ordinary_mixed_parametrization() -> None:
    instrumentation = ng.p.Instrumentation(
        ng.p.Array(shape=(2, 2), lower=-1, upper=1),
        bits=ng.p.TransitionChoice([2, 3, 4]),
        rate=ng.p.Log(lower=1e-4, upper=1.0),
        width=ng.p.Scalar(lower=0, upper=9).set_integer_casting(),
        fixed="as it is",
    )
    instrumentation.random_state = np.random.RandomState(0)
    optimizer = ng.optimizers.registry["EvoPress"](instrumentation, budget=600)

    def function(array: Any, *, bits: int, rate: float, width: int, fixed: str) -> float:
        assert fixed == "as it is"
        assert array.shape == (2, 2)
        return float((array**2).sum() + (bits - 3) ** 2 + np.log10(rate / 0.01) ** 2 + (width - 7) ** 2)

    found = optimizer.minimize(function)
    assert found.kwargs["bits"] == 3
    assert found.kwargs["width"] == 7
    assert found.loss < 0.01


def test_minimises_over_plain_coordinates_as_the_librarys_own_check_asks() -> None:
    optimizer = ng.optimizers.registry["EvoPress"](parametrization=2, budget=300, num_workers=2)
    optimizer.parametrization.random_state.seed(0)
    found = optimizer.minimize(lambda x: float(((x - np.array([0.5, -0.8])) ** 2).sum()))
    np.testing.assert_array_almost_equal(found.value, [0.5, -0.8], decimal=1)


def test_suggestions_foreign_tells_and_infinite_losses_are_taken() -> None:
    optimizer = ConfiguredEvoPress(costs=COSTS, cost_budget=BUDGET, offspring=4)(levels_array(), budget=100)
    for _ in range(6):
        optimizer.tell(optimizer.ask(), float("inf"))
    good = (1, 1, 1, 1, 1, 1, 0)
    optimizer.suggest(np.array(good))
    candidate = optimizer.ask()
    assert tuple(candidate.value) == good
    optimizer.tell(candidate, loss(good))
    optimizer.tell(optimizer.parametrization.spawn_child(new_value=np.array([3] * 6 + [1])), 0.0)  # over the budget
    for _ in range(40):
        candidate = optimizer.ask()
        assert cost(candidate.value) <= BUDGET
        optimizer.tell(candidate, loss(candidate.value))


def test_a_dumped_optimizer_goes_on(tmp_path: Path) -> None:
    optimizer = ng.optimizers.registry["EvoPress"](levels_array(), budget=100)
    for _ in range(20):
        optimizer.tell(optimizer.ask(), 1.0)
    optimizer.dump(tmp_path / "optimizer.pkl")
    again = ng.optimizers.registry["EvoPress"].load(tmp_path / "optimizer.pkl")
    assert [tuple(again.ask().value) for _ in range(5)] == [tuple(optimizer.ask().value) for _ in range(5)]


def test_a_noisy_search_scores_its_parent_again() -> None:
    quiet, noisy = search(0, 80), search(0, 80, noisy=True)
    assert len(set(noisy)) < len(noisy)
    assert len(set(quiet)) > len(set(noisy)) - 8


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidSettingError, match="go together"):
        ConfiguredEvoPress(cost_budget=3)(levels_array(), budget=10)
    with pytest.raises(InvalidSpaceError, match="2 coordinates given, there are 7"):
        ConfiguredEvoPress(costs=[(1, 2)] * 2, cost_budget=3)(levels_array(), budget=10)
    with pytest.raises(InvalidSettingError, match="offspring"):
        ConfiguredEvoPress(offspring=0)
    with pytest.raises(InvalidSpaceError, match="choices that are constants"):
        ng.optimizers.registry["EvoPress"](ng.p.Choice([ng.p.Scalar(), 1]), budget=10)
