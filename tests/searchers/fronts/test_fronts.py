"""Searchers over a whole range of budgets: conformance, known fronts, shares of the purse, and who is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest

from benchmarks.problems.synthetic import additive, interacting, noisy
from evo_hpo.errors import InvalidSettingError, UnknownNameError
from evo_hpo.search.budget import Allowance, Budget
from evo_hpo.search.conformance import SPACES, SearcherConformance, TokenProblem
from evo_hpo.search.loop import SearchResult, search
from evo_hpo.search.problem import Problem
from evo_hpo.search.searcher import Searcher
from evo_hpo.search.trial import Batch
from evo_hpo.space.compression_space import CompressionSpace
from evo_hpo.space.ranges import marks, spanning
from searchers import make_searcher
from searchers.fronts import curvature_front
from searchers.fronts.additive_front import AdditiveFront
from searchers.fronts.curvature_front import CurvatureFront
from searchers.fronts.evopress_front import EvoPressFront
from searchers.fronts.interleaved import Interleaved
from searchers.fronts.union import family

RANGED = spanning(
    CompressionSpace.from_average(SPACES["unequal"].units, 2.3),
    CompressionSpace.from_average(SPACES["unequal"].units, 3.6),
)
MADE: Mapping[str, type[Searcher]] = {
    "additive_front": AdditiveFront,
    "curvature_front": CurvatureFront,
    "evopress_front": EvoPressFront,
    "union:evopress": family.member("evopress"),
    "union:curvature_region": family.member("curvature_region"),
    "union:random": family.member("random"),
}
FOREIGN = ("optuna:nsga2", "nevergrad:DE", "nevergrad:DiscreteOnePlusOne")


def made(name: str, space: CompressionSpace, seed: int = 0, **settings: Any) -> Searcher:
    return (
        MADE[name](space, seed=seed, **settings) if name in MADE else make_searcher(name, space, seed=seed, **settings)
    )


class TestConformance(SearcherConformance):
    """At single budgets too, where the front is from the cheapest assignment to the budget."""

    names = ("additive_front", "curvature_front", "evopress_front", "union:evopress")
    settings: ClassVar[Mapping[str, Any]] = {}

    def searcher(self, name: str, space: CompressionSpace, seed: int) -> Searcher:
        return made(name, space, seed)


def run(name: str, problem: Problem, seed: int = 0, evaluations: int = 60, **settings: Any) -> SearchResult:
    searcher = made(name, problem.space, seed, **settings)
    return search(searcher, problem, budget=Budget(evaluations=evaluations), seed=seed, checkpoints=[0.5, 1.0])


@pytest.mark.parametrize("name", [*MADE, *FOREIGN, "uniform", "random", "evopress"])
def test_every_trial_is_in_the_range_and_the_same_seed_gives_the_same_front(name: str) -> None:
    problem: Problem = TokenProblem(RANGED)
    first = run(name, problem)
    assert first.front
    assert all(RANGED.feasible(o.trial.levels) for o in first.outcomes)
    assert all(RANGED.feasible(p.levels) for p in first.front)
    again = run(name, TokenProblem(RANGED))
    assert [o.trial for o in again.outcomes] == [o.trial for o in first.outcomes]
    assert again.front == first.front


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unequal", [False, True])
def test_an_additive_front_is_recovered_exactly_at_every_mark(seed: int, unequal: bool) -> None:
    problem = additive(units=12, levels=4, tightness=0.1, tightest=0.9, unequal=unequal, seed=seed)
    result = run("additive_front", problem, seed, 200)
    for mark in marks(problem.space):
        known = min(least for cost, least in problem.optima if cost <= mark)
        found = min((p.loss for p in result.front if p.cost <= mark), default=math.inf)
        assert found == pytest.approx(known, rel=1e-9, abs=1e-12)


def test_probes_that_leave_the_range_are_paid_for_by_another_unit() -> None:
    """The range is narrower than the step of a large unit."""
    problem = additive(units=7, levels=3, tightness=0.45, tightest=0.55, unequal=True)
    result = run("additive_front", problem, 0, 200)
    for mark in marks(problem.space):
        known = min((loss for cost, loss in problem.optima if cost <= mark), default=math.inf)
        assert min((p.loss for p in result.front if p.cost <= mark), default=math.inf) == pytest.approx(known)


@pytest.mark.parametrize("seed", range(2))
def test_curvature_that_tells_the_truth_gives_the_best_front_at_once(seed: int) -> None:
    settings = {"units": 14, "levels": 4, "unequal": True, "interaction": 0.0, "noise": 0.0, "seed": seed}
    problem = noisy(tightness=0.1, tightest=0.9, sensitivities="exact", **settings)
    searcher = CurvatureFront(problem.space, seed=seed)
    result = search(searcher, problem, budget=Budget(tokens=60 * 1024), seed=seed, checkpoints=[1.0])
    missed = [
        p.held_out["loss"] / min(loss for cost, loss in problem.optima if cost <= p.cost) - 1
        for p in result.front
        if p.cost < problem.space.budget
    ]
    assert len(missed) > 10
    assert max(missed) < 0.25
    assert sum(missed) / len(missed) < 0.05


def test_between_measured_assignments_the_front_takes_levels_of_the_two_only() -> None:
    problem = noisy(units=28, tightness=0.2, tightest=0.9, unequal=True)
    searcher = CurvatureFront(problem.space)
    search(searcher, problem, budget=Budget(tokens=80 * 1024), seed=0)
    measured, front = searcher.recommended(), searcher.front()
    assert len(measured) == 5
    assert len(front) > 15
    for levels in front:
        cost = problem.space.cost(levels)
        below = [a for a in measured if problem.space.cost(a) <= cost][-1]
        above = next(a for a in measured if problem.space.cost(a) >= cost)
        assert all(min(a, b) <= k <= max(a, b) for k, a, b in zip(levels, below, above, strict=True))


@pytest.mark.parametrize("signs", [(0.0,), (1.0,), (1.0, -1.0)], ids=["sees no loss", "sees gains", "sees both"])
def test_a_model_that_is_wrong_leaves_no_budget_without_an_assignment(
    monkeypatch: pytest.MonkeyPatch, signs: tuple[float, ...]
) -> None:
    problem = noisy(units=28, tightness=0.2, tightest=0.9, unequal=True)
    searcher = CurvatureFront(problem.space, budgets=3)
    search(searcher, problem, budget=Budget(tokens=80 * 1024), seed=0)
    costs_of = problem.space.knapsack.first_costs
    told = [[signs[u % len(signs)] * cost for cost in costs] for u, costs in enumerate(costs_of)]
    monkeypatch.setattr(curvature_front, "expected", lambda *_: told)
    costs = sorted(problem.space.cost(levels) for levels in searcher.front())
    measured = [problem.space.cost(levels) for levels in searcher.recommended()]
    for low, high in itertools.pairwise(measured):
        between = [cost for cost in costs if low < cost < high]
        assert len(between) > 3
        steps = [b - a for a, b in itertools.pairwise([low, *between, high])]
        assert max(steps) <= max(max(unit) - min(unit) for unit in problem.space.knapsack.first_costs)


def test_to_look_at_the_front_changes_no_trial() -> None:
    problem = noisy(units=14, tightness=0.2, tightest=0.9)
    looked, alone = (
        search(CurvatureFront(problem.space), problem, budget=Budget(tokens=60 * 1024), checkpoints=checkpoints)
        for checkpoints in ([0.2, 0.3, 0.4, 0.6, 0.8, 1.0], [])
    )
    assert [o.trial for o in looked.outcomes] == [o.trial for o in alone.outcomes]


def test_one_pass_serves_all_budgets() -> None:
    problem = TokenProblem(RANGED)
    result = search(CurvatureFront(RANGED, slopes=False), problem, budget=Budget(tokens=64 * 100))
    assert len(result.probes) == 1
    union = search(made("union:curvature_region", RANGED, slopes=False), problem, budget=Budget(tokens=64 * 100))
    assert len(union.probes) == 5


@pytest.mark.parametrize("kind", ["tokens", "evaluations"])
def test_the_searches_of_a_union_get_equal_shares(kind: str) -> None:
    problem = TokenProblem(RANGED)
    searcher = made("union:random", RANGED)
    assert isinstance(searcher, Interleaved)
    amount = {"tokens": 64 * 100, "evaluations": 100}[kind]
    search(searcher, problem, budget=Budget(**{kind: amount}))
    spent = searcher._spent
    assert sum(spent) == amount
    assert max(spent) - min(spent) <= {"tokens": 64, "evaluations": 1}[kind] * 8


def test_a_search_of_a_union_is_told_of_its_share_only() -> None:
    searcher, told = made("union:random", RANGED), dict[int, list[tuple[int | None, int]]]()
    assert isinstance(searcher, Interleaved)

    def noted(number: int, ask: Callable[[Allowance], Batch | None]) -> Callable[[Allowance], Batch | None]:
        def own(allowance: Allowance) -> Batch | None:
            told.setdefault(number, []).append((allowance.evaluations, searcher._spent[number]))
            return ask(allowance)

        return own

    for number, each in enumerate(searcher.inner):
        each.ask = noted(number, each.ask)  # type: ignore[method-assign, assignment]
    search(searcher, TokenProblem(RANGED), budget=Budget(evaluations=100))
    assert sorted(told) == [0, 1, 2, 3, 4]
    assert all(left == 20 - spent for own in told.values() for left, spent in own)


@pytest.mark.parametrize("kind", ["tokens", "evaluations"])
def test_the_searches_of_a_union_are_charged_for_their_passes(kind: str) -> None:
    searcher = made("union:curvature_region", RANGED, slopes=False)
    amount = {"tokens": 64 * 100, "evaluations": 400}[kind]
    result = search(searcher, TokenProblem(RANGED), budget=Budget(**{kind: amount}))
    assert isinstance(searcher, Interleaved)
    assert len(result.probes) == 5
    assert result.ledger is not None
    assert sum(searcher._spent) == {"tokens": result.ledger.tokens, "evaluations": result.ledger.evaluations}[kind]


class Uneven(Interleaved):
    """The lowest search scores one assignment, the others go on for ever."""

    def make(self, space: CompressionSpace) -> Searcher:
        name = "uniform" if space.budget == RANGED.floor else "random"
        return make_searcher(name, space, **({} if name == "uniform" else {"batch": 3}))


def test_what_a_search_leaves_goes_to_those_that_still_run() -> None:
    searcher = Uneven(RANGED)
    result = search(searcher, TokenProblem(RANGED), budget=Budget(evaluations=101))
    assert len(result.outcomes) == 101
    assert searcher._spent[0] == 1
    assert max(searcher._spent[1:]) - min(searcher._spent[1:]) <= 3
    assert result.stop_reason == "the budget is spent"


def test_a_union_of_searches_that_end_says_so() -> None:
    result = search(family.member("uniform")(RANGED), TokenProblem(RANGED), budget=Budget(evaluations=50))
    assert len(result.outcomes) == 5
    assert result.stop_reason == "the searches at all budgets have ended: uniform compression has one assignment"


def test_a_union_gives_what_each_search_recommends_and_keeps_lineage() -> None:
    problem = TokenProblem(RANGED)
    searcher = made("union:evopress", RANGED)
    result = search(searcher, problem, budget=Budget(evaluations=120))
    assert isinstance(searcher, Interleaved)
    budgets = [each.space.budget for each in searcher.inner]
    assert budgets == list(marks(RANGED, 4))
    assert [p.levels for p in result.front] == searcher.recommended()
    numbers = [o.trial.number for o in result.outcomes]
    assert numbers == list(range(len(numbers)))
    made_from = [
        (o.trial, result.outcomes[o.trial.parent].trial) for o in result.outcomes if o.trial.parent is not None
    ]
    assert made_from
    assert all(child.number > parent.number for child, parent in made_from if child.note != "parent")


def test_neighbours_along_the_front_are_fed() -> None:
    """Among the parents of a budget's offspring are its neighbours', brought to that budget."""
    problem = interacting(units=16, levels=4, tightness=0.2, tightest=0.8, seed=1)
    searcher = EvoPressFront(problem.space)
    search(searcher, problem, budget=Budget(evaluations=200))
    for place, member in enumerate(searcher.population):
        near = len(searcher.population[max(0, place - 1) : place + 2]) - 1
        breeders = [c.levels for c in member.breeders()]
        assert breeders.count(member.parents[0].levels) >= 6
        assert len(breeders) == 6 + near
        assert all(member.space.feasible(levels) for levels in breeders)


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_optimizers_begin_with_uniform_at_five_budgets_and_repair_only_what_is_outside(name: str) -> None:
    problem = additive(units=20, levels=5, tightness=0.1, tightest=0.9, unequal=True)
    result = run(name, problem, 0, 80)
    costs = [problem.space.cost(o.trial.levels) for o in result.outcomes]
    assert costs[:5] == sorted(costs[:5])
    assert (costs[0], len(set(costs[:5]))) == (problem.space.floor, 5)
    assert len({*costs}) > 15, "not poured up to the budget"


def test_those_of_one_objective_are_refused() -> None:
    with pytest.raises(InvalidSettingError, match="CmaEsSampler knows one objective: over a range take nsga2 or tpe"):
        make_searcher("optuna:cmaes", RANGED)
    with pytest.raises(InvalidSettingError, match="keys' spends the whole budget: over a range take 'projection'"):
        make_searcher("optuna:tpe", RANGED, encoding="keys")


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InvalidSettingError, match="budgets=1 must be an integer of at least 2"):
        CurvatureFront(RANGED, budgets=1)
    with pytest.raises(UnknownNameError, match="it is union already"):
        family.member("union:evopress")
    nested = EvoPressFront(RANGED, minibatch="nested", survivors=[2, 1], tokens=[16, 64])
    with pytest.raises(InvalidSettingError, match="nested minibatches cannot be read in turns"):
        search(nested, TokenProblem(RANGED), budget=Budget(tokens=64 * 200))
    with pytest.raises(InvalidSettingError, match="seconds cannot be shared out"):
        search(EvoPressFront(RANGED), TokenProblem(RANGED), budget=Budget(seconds=5))
    with pytest.raises(InvalidSettingError, match="tightest=0.5 must be above tightness=0.6"):
        additive(tightest=0.5)
