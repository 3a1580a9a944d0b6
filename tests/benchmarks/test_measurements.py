"""The measurements of searchers: what is timed, what is counted, and that every searcher of their plans runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.measurements.searchers.generations import generations
from benchmarks.measurements.searchers.overhead import overhead
from evo_hpo import Budget, FunctionProblem, search
from evo_hpo.run.entries import SearcherEntry
from evo_hpo.run.plan_file import PlanFile
from evo_hpo.search.registry import make_problem, make_searcher

SMALL = PlanFile.read(Path(__file__).parents[2] / "benchmarks" / "plans" / "small-spaces.toml").plan()
OURS = [entry for entry in SMALL.searchers if not entry.name.startswith(("optuna", "never"))]


@pytest.mark.parametrize("entry", OURS, ids=lambda e: e.key)
def test_every_searcher_of_small_spaces_runs(entry: SearcherEntry) -> None:
    problem = make_problem(SMALL.problems[0].name, **SMALL.problems[0].settings_of(0))
    assert isinstance(problem, FunctionProblem)
    assert problem.optimum is not None
    searcher = make_searcher(entry.name, problem.space, seed=0, **entry.settings)
    result = search(searcher, problem, budget=Budget(evaluations=30), seed=0)
    assert result.best is not None
    assert len(result.outcomes) <= 30
    assert problem.optimum - 1e-9 <= problem.validate(result.best)["loss"]


def test_overhead_is_timed_for_the_trials_that_were_made() -> None:
    seconds, trials, cut = overhead("evopress", 30, 20)
    assert trials == 20
    assert 0 < seconds < 1
    assert not cut


def test_a_search_that_takes_longer_than_the_limit_is_cut_off_and_timed_over_what_it_made() -> None:
    seconds, trials, cut = overhead("evopress", 30, 10**6, limit=0.05)
    assert cut
    assert 0.05 < seconds < 5
    assert 0 < trials < 10**6


@pytest.mark.parametrize("offspring", [1, 8])
def test_evopress_needs_about_k_times_the_rest_over_lambda_generations_on_linear_losses(offspring: int) -> None:
    mean = sum(generations(30, 10, offspring, seed) for seed in range(6)) / 6
    assert 0.5 < mean / (10 * 20 / offspring) < 6
