"""Problem `tabular`: the shipped landscapes, their optimum, and that nothing about them is random."""

from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.problems.depth import dropped
from benchmarks.problems.landscape import LANDSCAPES, read, tabular
from benchmarks.problems.surrogate import Features
from evo_hpo import Budget, Minibatch, search
from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.problem import FunctionProblem
from evo_hpo.search.registry import make_problem
from searchers import make_searcher

EXHAUSTIVE = tuple(name for name in LANDSCAPES if name != "smollm2-3bit")
COUNTS = {"pairs-3": 455, "pairs-4": 1365, "pairs-5": 3003, "blocks-3": 4060}


@pytest.mark.parametrize("name", EXHAUSTIVE)
def test_brute_force_finds_the_optimum_that_the_problem_names(name: str) -> None:
    problem = tabular(name)
    assert problem.space.count() == COUNTS[name]
    searcher = make_searcher("brute_force", problem.space, seed=0)
    result = search(searcher, problem, budget=Budget(evaluations=COUNTS[name]))
    assert len(result.outcomes) == COUNTS[name]
    assert {o.status for o in result.outcomes} == {"complete"}
    assert result.best_loss == problem.optimum == min(o.loss for o in result.outcomes)
    assert problem.validate(problem.space.uniform())["loss"] > result.best_loss > 0


def test_a_looked_up_loss_is_the_mean_over_the_sequences() -> None:
    recorded, chosen = read("pairs"), dropped(15, (2, 7, 11))
    row = next(i for i, kept in enumerate(recorded.arrays["kept"]) if tuple(kept) == chosen)
    [score] = tabular("pairs-3").score([chosen], Minibatch(0, 0))
    assert score.loss == pytest.approx(recorded.arrays["losses"][row].mean(dtype=np.float64))


@pytest.mark.parametrize("name", LANDSCAPES)
def test_the_same_assignment_has_the_same_loss_in_any_order(name: str) -> None:
    problem = tabular(name)
    rng = np.random.default_rng(0)
    asked = [problem.space.uniform(), *(problem.space.sample(rng) for _ in range(20))]
    there = [s.loss for s in problem.score(asked, Minibatch(0, 0))]
    tabular.cache_clear()
    read.cache_clear()
    back = [s.loss for s in tabular(name).score(asked[::-1], Minibatch(9, 0))]
    assert there == back[::-1]
    assert all(loss > 0 for loss in there)
    assert tabular(name).fingerprint() == problem.fingerprint()


def test_the_surrogate_is_close_to_every_row_it_was_fitted_to() -> None:
    problem, arrays = tabular("smollm2-3bit"), read("bits").arrays
    told = np.array([problem.function(tuple(row)) for row in arrays["levels"].tolist()])
    measured = arrays["losses"].mean(axis=1, dtype=np.float64)
    assert np.median(np.abs(told / measured - 1)) < 0.03
    assert np.corrcoef(np.log(told), np.log(measured))[0, 1] > 0.99
    assert all(problem.space.feasible(row) for row in arrays["levels"].tolist())


def test_the_shipped_form_is_that_of_the_shipped_rows() -> None:
    from benchmarks.measurements.landscapes.fitting import fit

    arrays, problem = read("bits").arrays, tabular("smollm2-3bit")
    measured = arrays["losses"].astype(np.float64).mean(axis=1)
    again = fit(Features.of(problem.space), arrays["levels"], measured, arrays["settings"])
    for row in arrays["levels"][::97].tolist():
        assert problem.function(tuple(row)) == pytest.approx(again(tuple(row)), rel=1e-4)


def test_reports_are_told_that_surrogate_values_are_not_measurements() -> None:
    assert any("Not measured" in note for note in tabular("smollm2-3bit").notes)
    assert tabular("smollm2-3bit").optimum is None
    assert any("Exhaustive" in note for note in tabular("pairs-5").notes)


def test_evopress_beats_uniform_on_the_surrogate() -> None:
    problem = tabular("smollm2-3bit")
    first, second = (
        search(make_searcher("evopress", problem.space, seed=1), problem, budget=Budget(evaluations=300), seed=1)
        for _ in range(2)
    )
    assert first.best == second.best
    assert first.best_loss < problem.validate(problem.space.uniform())["loss"]


@pytest.mark.parametrize("name", ["pairs-5", "smollm2-3bit"])
def test_a_thousand_evaluations_take_less_than_a_second(name: str) -> None:
    problem = tabular(name)
    asked = [problem.space.sample(np.random.default_rng(0))] * 1000
    begin = time.process_time()
    problem.score(asked, Minibatch(0, 0))
    assert time.process_time() - begin < 1


def test_registered_and_checked() -> None:
    made = make_problem("tabular", landscape="pairs-4")
    assert isinstance(made, FunctionProblem)
    assert made.optimum == tabular("pairs-4").optimum
    with pytest.raises(InvalidSettingError, match="pairs-5"):
        tabular("pairs-7")
