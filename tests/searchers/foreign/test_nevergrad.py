"""Nevergrad's optimizers as searchers: what they score, what they are told, and that a seed says it all."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest

from evo_hpo import Allowance, Assignment, Budget, CompressionSpace, FunctionProblem, Unit, search
from evo_hpo.errors import InfeasibleError, InvalidSettingError, UnknownNameError
from evo_hpo.search.trial import Outcome
from searchers import make_searcher
from searchers.foreign.nevergrad_adapter import NevergradSearcher, family, load
from tests.searchers.asking import asked

SPACE = CompressionSpace(
    [Unit(f"u{i}", tuple(c * (1 + i % 2) for c in (2, 3, 4, 5)), fixed=1 if i == 4 else None) for i in range(7)],
    budget=30,
)
FREE = [i for i in range(len(SPACE)) if i != 4]
WEIGHTS = np.random.default_rng(0).gamma(1.0, 1.0, len(SPACE))
KINDS = (
    "DiscreteOnePlusOne",
    "DiscreteLenglerOnePlusOne",
    "OnePlusOne",
    "CMA",
    "DE",
    "TwoPointsDE",
    "PSO",
    "TBPSA",
    "NGOpt",
    "Portfolio",
    "ScrHammersleySearch",
    "RandomSearch",
    "Cobyla",  # runs its solver in a thread
    "cGA",
)
"""One of each kind that the library has."""


def loss(levels: Assignment) -> float:
    return float(sum(w * 4.0**-k for w, k in zip(WEIGHTS, levels, strict=True)))


def run(name: str, trials: int = 40, seed: int = 0, **settings: Any) -> tuple[NevergradSearcher, list[Outcome]]:
    searcher = make_searcher(f"nevergrad:{name}", SPACE, seed=seed, **settings)
    assert isinstance(searcher, NevergradSearcher)
    return searcher, search(searcher, FunctionProblem(SPACE, loss), budget=Budget(evaluations=trials)).outcomes


@pytest.mark.parametrize("encoding", NevergradSearcher.encodings)
@pytest.mark.parametrize("name", KINDS)
def test_every_trial_is_feasible_and_the_first_is_uniform(name: str, encoding: str) -> None:
    searcher, outcomes = run(name, encoding=encoding)
    assert len(outcomes) == 40
    assert all(SPACE.feasible(o.trial.levels) for o in outcomes)
    assert outcomes[0].trial.levels == SPACE.uniform()
    assert searcher.recommend() == min(outcomes, key=lambda o: o.loss).trial.levels


@pytest.mark.parametrize("name", ["DE", "DiscreteOnePlusOne", "OnePlusOne", "TBPSA", "NGOpt"])
def test_the_optimizers_archive_holds_the_repaired_points_with_their_losses(name: str) -> None:
    searcher, outcomes = run(name, encoding="repaired")
    archived = {tuple(int(k) for k in told.parameter.value): told.mean for told in searcher.optimizer.archive.values()}
    scored = {tuple(o.trial.levels[i] for i in FREE): o.loss for o in outcomes}
    assert archived == pytest.approx(scored)


def test_the_population_of_differential_evolution_is_feasible() -> None:
    searcher, _ = run("DE", 120, encoding="repaired")
    for individual in searcher.optimizer.population.values():
        levels = list(SPACE.lowest)
        for i, k in zip(FREE, individual.value, strict=True):
            levels[i] = int(k)
        assert SPACE.feasible(levels)


def test_native_leaves_the_proposals_in_the_archive() -> None:
    searcher, _ = run("DE", encoding="native")
    costs = []
    for told in searcher.optimizer.archive.values():
        levels = list(SPACE.lowest)
        for i, k in zip(FREE, told.parameter.value, strict=True):
            levels[i] = int(k)
        costs.append(SPACE.cost(levels))
    assert max(costs) > SPACE.budget


@pytest.mark.parametrize("name", KINDS)
def test_a_failed_trial_is_told_and_the_search_goes_on(name: str) -> None:
    def failing(levels: Assignment) -> float:
        return math.nan if sum(levels) % 3 == 0 else loss(levels)

    searcher = make_searcher(f"nevergrad:{name}", SPACE)
    assert isinstance(searcher, NevergradSearcher)
    outcomes = search(searcher, FunctionProblem(SPACE, failing), budget=Budget(evaluations=40)).outcomes
    assert len(outcomes) == 40
    assert {o.status for o in outcomes} == {"complete", "failed"}
    assert searcher.optimizer.num_tell >= 39  # a start of ours may find an optimizer that takes no foreign points
    assert searcher.recommend() is not None


def _levels(name: str, seed: int) -> list[Assignment]:
    return [o.trial.levels for o in run(name, 30, seed)[1]]


def test_numpys_global_generator_is_left_as_it_was_and_changes_nothing() -> None:
    name = "LognormalDiscreteOnePlusOne"  # one of many that draw from it
    expected = _levels(name, 1)
    np.random.seed(123)  # noqa: NPY002
    before: Any = np.random.get_state()  # noqa: NPY002
    assert _levels(name, 1) == expected
    after: Any = np.random.get_state()  # noqa: NPY002
    assert (before[1] == after[1]).all()


def test_batches_and_the_last_batch_keep_the_allowance() -> None:
    searcher = make_searcher("nevergrad:DE", SPACE, batch=4)
    assert len(asked(searcher, Allowance(evaluations=1000))) == 1  # the start is told before anything else is asked
    searcher.tell([])
    assert len(asked(searcher, Allowance(evaluations=1000))) == 4
    searcher.tell([])
    assert len(asked(searcher, Allowance(evaluations=3))) == 3


def test_the_optimizer_is_told_to_expect_what_the_budget_pays_for() -> None:
    for allowance, horizon in (
        (Allowance(evaluations=77), 77),
        (Allowance(tokens=5000, default_tokens=100), 50),
        (Allowance(), 1000),
    ):
        searcher = make_searcher("nevergrad:NGOpt", SPACE)
        assert isinstance(searcher, NevergradSearcher)
        searcher.ask(allowance)
        assert searcher.optimizer.budget == horizon


def test_all_that_can_work_are_listed_and_others_say_why_they_cannot() -> None:
    members = family.members()
    assert len(members) > 450
    assert set(members) <= set(load().optimizers.registry)
    assert "EvoPress" not in members
    for name, reason in (
        ("CmaFmin2", "clock"),
        ("NLOPT_GN_AGS", "nlopt"),
        ("SVM1MetaModel", "numpy"),
        ("CMAILL", "numpy"),
    ):
        assert name not in members
        with pytest.raises(InvalidSettingError, match=reason):
            make_searcher(f"nevergrad:{name}", SPACE)
    with pytest.raises(UnknownNameError, match=r"did you mean .*NGOpt"):
        make_searcher("nevergrad:NGOp", SPACE)


def test_an_optimizer_that_breaks_in_the_middle_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = make_searcher("nevergrad:DE", SPACE)
    assert isinstance(searcher, NevergradSearcher)
    searcher.ask(Allowance(evaluations=10))
    searcher.tell([])

    def broken() -> None:
        raise TypeError("only 0-dimensional arrays")

    monkeypatch.setattr(searcher.optimizer, "ask", broken)
    searcher._waiting.clear()
    with pytest.raises(InvalidSettingError, match=r"nevergrad's DE failed while being asked .TypeError: only 0-dim"):
        searcher.ask(Allowance(evaluations=9))


@pytest.mark.parametrize("name", ["CMA", "DiagonalCMA", "DiscreteOnePlusOne", "NGOpt", "OnePlusOne", "TBPSA"])
def test_units_that_are_dropped_or_kept_are_searched_too(name: str) -> None:
    space = CompressionSpace([Unit(f"layers.{i}.mlp", (0, 1)) for i in range(20)], 12)
    harm = np.random.default_rng(0).gamma(1.0, 1.0, 20)
    problem = FunctionProblem(space, lambda levels: -float(harm @ np.array(levels)))
    outcomes = search(make_searcher(f"nevergrad:{name}", space), problem, budget=Budget(evaluations=150)).outcomes
    kept = -np.sort(-harm)[:12].sum()
    first = outcomes[0].loss
    assert (first - min(o.loss for o in outcomes)) > 0.6 * (first - kept)


def test_the_default_encoding_may_depend_on_whether_units_have_two_levels() -> None:
    dropped = CompressionSpace([Unit(f"u{i}", (0, 1)) for i in range(4)], 2)
    for name, several, two in (("CMA", "repaired", "repaired"), ("NGOpt", "projection", "native")):
        for space, encoding in ((SPACE, several), (dropped, two)):
            searcher = make_searcher(f"nevergrad:{name}", space)
            assert isinstance(searcher, NevergradSearcher)
            assert searcher.encoding.name == encoding


def test_settings_outside_their_range_are_refused() -> None:
    for settings, message in (
        ({"encoding": "sequential"}, "encoding='sequential' must be one of"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"sigma": "wide"}, "sigma='wide'"),
        ({"fill": "no"}, "fill='no' must be true or false"),
        ({"horizon": 0}, "horizon=0"),
        ({"batch": 0}, "batch=0"),
        ({"penalty": -1.0}, "penalty=-1.0"),
    ):
        with pytest.raises(InvalidSettingError, match=message):
            make_searcher("nevergrad:DE", SPACE, **settings)


def test_solver_threads_end_with_their_searcher() -> None:
    before = threading.active_count()
    run("Cobyla", 20)
    assert threading.active_count() <= before + 1


def test_a_space_of_one_assignment() -> None:
    space = CompressionSpace([Unit("a", (2, 3), fixed=0), Unit("b", (2,))], budget=9)
    searcher = make_searcher("nevergrad:DE", space)
    result = search(searcher, FunctionProblem(space, lambda a: 1.0), budget=Budget(evaluations=3))
    assert [o.trial.levels for o in result.outcomes] == [(0, 0)]
    assert result.stop_reason == "the space has one assignment"


def test_errors_of_our_own_keep_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(point: object) -> None:
        raise InfeasibleError("floor and budget are too close: widen them")

    space = CompressionSpace([Unit(f"u{i}", (2, 3, 4)) for i in range(6)], 18)
    searcher = make_searcher("nevergrad:OnePlusOne", space, start="none")
    assert isinstance(searcher, NevergradSearcher)
    monkeypatch.setattr(searcher.encoding, "decode", refuse)
    with pytest.raises(InfeasibleError, match="widen"):
        searcher.ask(Allowance(evaluations=10))


def test_a_single_unit_leaves_the_library_as_it_was() -> None:
    """In one dimension the library's CMA sets ``fcmaes`` on settings that its other optimizers share."""
    registry = load().optimizers.registry
    before = {name: getattr(optimizer, "fcmaes", None) for name, optimizer in registry.items()}
    space = CompressionSpace([Unit("a", (1, 2, 3, 4)), Unit("b", (1,))], budget=4)
    problem = FunctionProblem(space, lambda levels: abs(levels[0] - 1.0))
    for encoding in NevergradSearcher.encodings:
        searcher = make_searcher("nevergrad:CMA", space, seed=0, encoding=encoding)
        result = search(searcher, problem, budget=Budget(evaluations=20))
        assert len(result.outcomes) == 20
    assert {name: getattr(optimizer, "fcmaes", None) for name, optimizer in registry.items()} == before
