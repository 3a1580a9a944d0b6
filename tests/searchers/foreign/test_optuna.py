"""Optuna's samplers as searchers: what they score, what they are told, and that a seed says it all."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from threadpoolctl import threadpool_limits

from benchmarks.problems.bits import bits_space
from evo_hpo import Allowance, Assignment, Budget, CompressionSpace, FunctionProblem, Unit, search
from evo_hpo.errors import InvalidSettingError, MissingPackageError, UnknownNameError
from evo_hpo.search.trial import Outcome
from searchers import make_searcher
from searchers.foreign.encoding import ENCODINGS
from searchers.foreign.optuna_adapter import OptunaSearcher, family
from tests.searchers.asking import asked

SPACE = CompressionSpace(
    [Unit(f"u{i}", tuple(c * (1 + i % 2) for c in (2, 3, 4, 5)), fixed=1 if i == 4 else None) for i in range(7)],
    budget=30,
)
WEIGHTS = np.random.default_rng(0).gamma(1.0, 1.0, len(SPACE))
MEMBERS = family.members()
ASK = Allowance(evaluations=1000)


def loss(levels: Assignment) -> float:
    return float(sum(w * 4.0**-k for w, k in zip(WEIGHTS, levels, strict=True)))


def run(name: str, trials: int = 24, seed: int = 0, **settings: Any) -> tuple[OptunaSearcher, list[Outcome]]:
    searcher = make_searcher(f"optuna:{name}", SPACE, seed=seed, **settings)
    assert isinstance(searcher, OptunaSearcher)
    return searcher, search(searcher, FunctionProblem(SPACE, loss), budget=Budget(evaluations=trials)).outcomes


def seen(study: optuna.Study) -> list[Assignment]:
    """The study's trials as assignments."""
    found = []
    for trial in study.trials:
        levels = list(SPACE.lowest)
        for i, unit in enumerate(SPACE.units):
            if unit.name in trial.params:
                levels[i] = int(trial.params[unit.name])
        found.append(tuple(levels))
    return found


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", MEMBERS)
def test_every_trial_is_feasible_and_the_first_is_uniform(name: str, encoding: str) -> None:
    trials = 12 if name == "gp" else 24
    searcher, outcomes = run(name, trials, encoding=encoding)
    assert len(outcomes) == len(searcher.study.trials) == trials
    assert all(SPACE.feasible(o.trial.levels) for o in outcomes)
    assert outcomes[0].trial.levels == SPACE.uniform()
    assert searcher.recommend() == min(outcomes, key=lambda o: o.loss).trial.levels


@pytest.mark.parametrize("encoding", ["repaired", "projection", "sequential"])
@pytest.mark.parametrize("name", ["tpe", "cmaes", "nsga2"])
def test_the_study_holds_the_repaired_points_with_their_losses(name: str, encoding: str) -> None:
    searcher, outcomes = run(name, 40, encoding=encoding)
    assert seen(searcher.study) == [o.trial.levels for o in outcomes]
    assert [t.value for t in searcher.study.trials] == [o.loss for o in outcomes]


def test_native_leaves_the_proposals_in_the_study() -> None:
    searcher, outcomes = run("tpe", 40, encoding="native")
    proposals = seen(searcher.study)
    assert any(not SPACE.feasible(p) for p in proposals)
    assert [t.value for t in searcher.study.trials] == [o.loss for o in outcomes]


def test_a_penalty_is_added_exactly_where_the_proposal_was_over_the_budget() -> None:
    searcher, outcomes = run("tpe", 40, encoding="penalty", penalty=3.0, fill=False)
    over = 0
    for proposal, trial, outcome in zip(seen(searcher.study), searcher.study.trials, outcomes, strict=True):
        excess = max(0, SPACE.cost(proposal) - SPACE.budget) / SPACE.budget
        over += excess > 0
        assert trial.value == pytest.approx(outcome.loss * (1 + 3.0 * excess))
    assert over


def test_set_constraint_marks_the_proposals_over_the_budget() -> None:
    searcher, _ = run("tpe", 40, encoding="set_constraint")
    for proposal, trial in zip(seen(searcher.study), searcher.study.trials, strict=True):
        assert (trial.constraints["budget"] > 0) == (SPACE.cost(proposal) > SPACE.budget)


def test_cmaes_advances_its_generations_and_wastes_no_trial() -> None:
    searcher, _ = run("cmaes", 101, sampler={"popsize": 8})
    generations = [t.system_attrs.get("cma:generation") for t in searcher.study.trials]
    assert generations[0] is None  # the start
    assert generations[1:] == [g for g in range(13) for _ in range(8)][:100]


@pytest.mark.parametrize("name", ["cmaes", "tpe"])
def test_a_failed_trial_is_told_as_failed(name: str) -> None:
    def failing(levels: Assignment) -> float:
        return math.nan if levels[0] == 2 else loss(levels)

    searcher = make_searcher(f"optuna:{name}", SPACE)
    assert isinstance(searcher, OptunaSearcher)
    outcomes = search(searcher, FunctionProblem(SPACE, failing), budget=Budget(evaluations=40)).outcomes
    states = [t.state for t in searcher.study.trials]
    assert states == [TrialState.FAIL if o.status == "failed" else TrialState.COMPLETE for o in outcomes]
    assert {TrialState.FAIL, TrialState.COMPLETE} == set(states)


def test_cmaes_asks_the_same_on_any_number_of_threads() -> None:
    """Its products of 210 x 210 matrices are rounded otherwise where several threads share them."""
    space = bits_space(3.0)
    weights = np.random.default_rng(3).gamma(1.0, 1.0, len(space))
    problem = FunctionProblem(space, lambda a: float(sum(w * 4.0**-k for w, k in zip(weights, a, strict=True))))
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads, "blas"):
            searcher = make_searcher("optuna:cmaes", space, seed=0)
            found.append([o.trial.levels for o in search(searcher, problem, budget=Budget(evaluations=60)).outcomes])
    assert found[0] == found[1]


def test_trials_that_the_budget_does_not_pay_for_are_closed() -> None:
    searcher = make_searcher("optuna:random", SPACE, batch=5, start="none")
    assert isinstance(searcher, OptunaSearcher)
    trials = asked(searcher, ASK)
    searcher.tell([Outcome(t, loss(t.levels)) for t in trials.trials[:3]])
    assert [t.state.name for t in searcher.study.trials] == ["COMPLETE"] * 3 + ["FAIL"] * 2


def test_batches_and_the_last_batch_keep_the_allowance() -> None:
    searcher = make_searcher("optuna:tpe", SPACE, batch=4)
    assert len(asked(searcher, ASK)) == 1  # the start is told before anything else is asked
    searcher.tell([])
    assert len(asked(searcher, ASK)) == 4
    searcher.tell([])
    assert len(asked(searcher, Allowance(evaluations=3))) == 3


def test_tokens_and_minibatch_are_passed_on() -> None:
    terms = asked(make_searcher("optuna:random", SPACE, tokens=512, minibatch="fresh"), ASK).terms
    assert (terms.tokens, terms.draw) == (512, "fresh")


def test_sampler_settings_are_passed_through_and_unknown_ones_refused() -> None:
    searcher = make_searcher("optuna:tpe", SPACE, sampler={"n_startup_trials": 3})
    assert isinstance(searcher, OptunaSearcher)
    inner: Any = searcher.sampler.inner
    assert inner._n_startup_trials == 3
    assert inner._multivariate
    with pytest.raises(UnknownNameError, match=r"TPESampler has no setting 'n_start'; it has: .*n_startup_trials"):
        make_searcher("optuna:tpe", SPACE, sampler={"n_start": 3})
    with pytest.raises(UnknownNameError, match="'seed'"):
        make_searcher("optuna:tpe", SPACE, sampler={"seed": 3})
    with pytest.raises(InvalidSettingError, match="qmc_type"):
        make_searcher("optuna:qmc", SPACE, sampler={"qmc_type": "latin"})
    with pytest.raises(InvalidSettingError, match="encoding='best' must be one of"):
        make_searcher("optuna:tpe", SPACE, encoding="best")
    with pytest.raises(InvalidSettingError, match="start='zero'"):
        make_searcher("optuna:tpe", SPACE, start="zero")
    with pytest.raises(UnknownNameError, match="did you mean 'optuna:cmaes'"):
        make_searcher("optuna:cmae", SPACE)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("tpe", {"n_startup_trials": "x"}), ("tpe", {"gamma": 3}), ("cmaes", {"popsize": -1})],
    ids=str,
)
def test_sampler_settings_that_fail_later_name_the_sampler(name: str, settings: dict[str, Any]) -> None:
    expected = r"optuna's (TPE|CmaEs)Sampler failed when (asked|told) .*" + next(iter(settings))
    with pytest.raises(InvalidSettingError, match=expected):
        run(name, trials=30, sampler=settings)


def test_the_default_encoding_of_tpe_depends_on_whether_units_have_two_levels() -> None:
    dropped = CompressionSpace([Unit(f"u{i}", (0, 1)) for i in range(4)], 2)
    for name, space, encoding in (("tpe", SPACE, "keys"), ("tpe", dropped, "projection"), ("nsga2", dropped, "keys")):
        searcher = make_searcher(f"optuna:{name}", space)
        assert isinstance(searcher, OptunaSearcher)
        assert searcher.encoding.name == encoding
    explicit = make_searcher("optuna:tpe", dropped, encoding="keys")
    assert isinstance(explicit, OptunaSearcher)
    assert explicit.encoding.name == "keys"


def test_a_missing_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("cmaes is needed")

    monkeypatch.setattr(optuna.samplers, "CmaEsSampler", type("CmaEsSampler", (), {"__init__": refuse}))
    with pytest.raises((MissingPackageError, UnknownNameError)):
        make_searcher("optuna:cmaes", SPACE)


def test_optunas_logger_and_numpys_global_generator_are_left_as_they_were() -> None:
    level = logging.getLogger("optuna").level
    before: Any = np.random.get_state()  # noqa: NPY002
    run("cmaes", 20)
    run("nsga2", 20)
    assert logging.getLogger("optuna").level == level
    after: Any = np.random.get_state()  # noqa: NPY002
    assert (before[1] == after[1]).all()


def test_a_space_of_one_assignment() -> None:
    space = CompressionSpace([Unit("a", (2, 3), fixed=0), Unit("b", (2,))], budget=9)
    searcher = make_searcher("optuna:tpe", space)
    outcomes = search(searcher, FunctionProblem(space, lambda a: 1.0), budget=Budget(evaluations=3)).outcomes
    assert [o.trial.levels for o in outcomes] == [(0, 0)]
