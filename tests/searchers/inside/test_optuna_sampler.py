"""EvoPress inside an ordinary Optuna study: Optuna's own suite for samplers, and what only this sampler promises.

Of Optuna's suite, ``MultiObjectiveSamplerTestCase`` cannot apply: EvoPress ranks one loss. Its counterpart for samplers
of one objective, ``SingleOnlySamplerTestCase``, is run instead. No other case is left out.
"""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)
from optuna.trial import Trial, TrialState

from evo_hpo.errors import InfeasibleError, InvalidSettingError, InvalidSpaceError
from searchers.evopress.mutation import Uniforms
from searchers.inside.breeder import Breeder, budget_space
from searchers.inside.optuna_sampler import EvoPressSampler


@pytest.fixture(autouse=True)
def _no_log_lines() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


class TestOptunasOwnSuite(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: EvoPressSampler(seed=0, offspring=4)


COSTS = {f"layer{i}": (2, 3, 4, 8) for i in range(6)} | {"wide": (10, 20, 40)}
BUDGET = 40


def bits(trial: Trial) -> dict[str, int]:
    """The cost of each parameter that the trial suggests."""
    return {name: costs[trial.suggest_int(name, 0, len(costs) - 1)] for name, costs in COSTS.items()}


def loss(chosen: dict[str, int]) -> float:
    return sum((i + 1) / cost for i, cost in enumerate(chosen.values()))


def run(sampler: BaseSampler, trials: int, **settings: object) -> optuna.Study:
    study = optuna.create_study(sampler=sampler, **settings)  # type: ignore[arg-type]
    study.optimize(lambda t: loss(bits(t)), n_trials=trials)
    return study


def costs_of(study: optuna.Study) -> list[int]:
    return [sum(COSTS[name][level] for name, level in t.params.items()) for t in study.trials]


def brute_force() -> float:
    best = float("inf")
    for levels in itertools.product(*(range(len(c)) for c in COSTS.values())):
        chosen = {n: c[k] for (n, c), k in zip(COSTS.items(), levels, strict=True)}
        if sum(chosen.values()) <= BUDGET:
            best = min(best, loss(chosen))
    return best


def sampler(seed: int = 0, **settings: object) -> EvoPressSampler:
    return EvoPressSampler(costs=COSTS, budget=BUDGET, seed=seed, offspring=8, **settings)  # type: ignore[arg-type]


def test_no_trial_is_over_the_budget_and_the_optimum_is_found() -> None:
    study = run(sampler(), 300)
    assert max(costs_of(study)) <= BUDGET
    assert study.best_value == pytest.approx(brute_force())


def test_exact_losses_are_never_asked_for_twice_and_noisy_ones_are() -> None:
    tried = {noisy: [tuple(t.params.items()) for t in run(sampler(noisy=noisy), 120).trials] for noisy in (False, True)}
    assert len(set(tried[False])) == 120
    assert len(set(tried[True])) < 120


def test_the_floor_is_kept_too() -> None:
    study = run(sampler(floor=BUDGET - 1), 60)
    assert set(costs_of(study)) <= {BUDGET - 1, BUDGET}


def test_the_first_trial_is_uniform_compression() -> None:
    first = run(sampler(), 1).trials[0]
    assert tuple(first.params[name] for name in COSTS) == budget_space(COSTS, BUDGET).uniform()


@pytest.mark.parametrize(
    ("costs", "budget", "first"),
    [((2, 4, 8), 48, None), ((2, 3, 4), 36, dict.fromkeys(range(12), 0)), ((2, 3, 4), 36, dict.fromkeys(range(9), 1))],
    ids=["uneven steps", "from the cheapest", "from a point that leaves budget"],
)
def test_no_start_and_no_step_holds_the_search_at_one_point(
    costs: tuple[int, ...], budget: int, first: dict[int, int] | None
) -> None:
    names = [f"layer{i}" for i in range(12)]
    study = optuna.create_study(sampler=EvoPressSampler(costs=dict.fromkeys(names, costs), budget=budget, seed=0))
    if first is not None:
        study.enqueue_trial({name: first.get(i, 0) for i, name in enumerate(names)})
    study.optimize(lambda t: sum((i + 1) / costs[t.suggest_int(n, 0, 2)] for i, n in enumerate(names)), n_trials=60)
    assert len({tuple(t.params.values()) for t in study.trials}) == 60
    spent = [sum(costs[level] for level in t.params.values()) for t in study.trials]
    assert max(spent) == budget
    assert study.trials[0].value is not None
    assert study.best_value < study.trials[0].value


def test_without_exchanges_across_groups_a_little_slack_moves_no_budget_between_them() -> None:
    costs = {f"{k}{i}": (2 * s, 3 * s, 4 * s) for i in range(6) for k, s in (("small", 1), ("large", 5))}
    breeder = Breeder([3] * 12, budget_space(costs, 109), range(12), cross_group=0.0)  # uniform costs 108
    stream = Uniforms(np.random.default_rng(0))
    children = [breeder.child((1,) * 12, stream, lambda levels: False) for _ in range(200)]

    def share(size: str) -> set[int]:
        return {sum(costs[n][k] for n, k in zip(costs, c, strict=True) if n.startswith(size)) for c in children}

    assert share("large") == {90}
    assert share("small") == {18, 19}


def test_parallel_jobs_keep_the_budget() -> None:
    study = optuna.create_study(sampler=sampler())
    study.optimize(lambda t: loss(bits(t)), n_trials=60, n_jobs=4)
    assert len(study.trials) == 60
    assert max(costs_of(study)) <= BUDGET


def test_a_stopped_study_in_a_database_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    costs = dict.fromkeys(("a", "b", "c"), (2, 3, 4))

    def objective(trial: Trial) -> float:
        return sum((i + 1) / costs[n][trial.suggest_int(n, 0, 2)] for i, n in enumerate(costs))

    for name, pieces in (("whole", (14,)), ("pieces", (5, 9))):
        for piece in pieces:
            again = EvoPressSampler(costs=costs, budget=9, seed=0, offspring=3)
            study = optuna.create_study(study_name=name, storage=storage, sampler=again, load_if_exists=True)
            study.optimize(objective, n_trials=piece)
    whole, pieced = (optuna.load_study(study_name=n, storage=storage) for n in ("whole", "pieces"))
    assert [t.params for t in whole.trials] == [t.params for t in pieced.trials]
    with closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        assert connection.execute("select count(*) from trials").fetchone() == (28,)


def _params(seed: int) -> list[dict[str, int]]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return [t.params for t in run(sampler(seed), 40).trials]


def test_same_seed_same_trials_in_a_spawned_process_and_another_seed_differs() -> None:
    here = _params(1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_params, (1,)) == here
    assert _params(2) != here


def test_a_sampler_that_was_used_can_be_pickled_and_goes_on_alike() -> None:
    whole = run(sampler(), 30)
    study = run(sampler(), 12)
    study.sampler = pickle.loads(pickle.dumps(study.sampler))
    study.optimize(lambda trial: loss(bits(trial)), n_trials=18)
    assert [t.params for t in study.trials] == [t.params for t in whole.trials]


def test_ask_and_tell_with_fixed_distributions() -> None:
    study = optuna.create_study(sampler=sampler())
    distributions = {n: optuna.distributions.IntDistribution(0, len(c) - 1) for n, c in COSTS.items()}
    for _ in range(50):
        trial = study.ask(distributions)  # type: ignore[arg-type]
        study.tell(trial, loss({n: COSTS[n][k] for n, k in trial.params.items()}))
    assert max(costs_of(study)) <= BUDGET


def test_ordered_choices_and_maximisation() -> None:
    costs = {f"w{i}": (2, 3, 4) for i in range(8)}
    study = optuna.create_study(sampler=EvoPressSampler(costs=costs, budget=24, seed=0), direction="maximize")

    def objective(trial: Trial) -> float:
        chosen = [trial.suggest_categorical(name, [2, 3, 4]) for name in costs]
        assert sum(chosen) <= 24
        return float(sum(i * bits for i, bits in enumerate(chosen)))

    study.optimize(objective, n_trials=200)
    assert study.best_value == sum(i * b for i, b in enumerate([2, 2, 2, 2, 4, 4, 4, 4]))


def test_failed_and_pruned_trials_are_not_parents() -> None:
    study = optuna.create_study(sampler=sampler())

    def objective(trial: Trial) -> float:
        value = loss(bits(trial))
        if trial.number % 3 == 0:
            raise RuntimeError("out of memory")
        if trial.number % 3 == 1 and trial.number > 2:
            raise optuna.TrialPruned
        return value

    study.optimize(objective, n_trials=90, catch=(RuntimeError,))
    assert {t.state for t in study.trials} == {TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED}
    assert max(costs_of(study)) <= BUDGET
    assert study.best_value < study.trials[2].value  # type: ignore[operator]


def test_every_trial_failing_still_proposes_different_feasible_ones() -> None:
    study = optuna.create_study(sampler=sampler())

    def objective(trial: Trial) -> float:
        bits(trial)
        raise RuntimeError("always")

    study.optimize(objective, n_trials=20, catch=(RuntimeError,))
    assert max(costs_of(study)) <= BUDGET
    assert len({tuple(t.params.items()) for t in study.trials}) > 10


def test_a_noisy_study_scores_its_parent_again_in_every_generation() -> None:
    study = run(sampler(noisy=True), 60)
    seen = [tuple(t.params.items()) for t in study.trials]
    assert len(seen) > len(set(seen))
    study = run(sampler(noisy=False), 60)
    generations: dict[int, list[tuple[object, ...]]] = {}
    for t in study.trials:
        generations.setdefault(t.system_attrs.get("evopress:generation", -1), []).append(tuple(t.params.items()))
    assert all(len(members) == len(set(members)) for members in generations.values())


def test_a_noisy_study_goes_on_from_the_last_generation_that_has_a_result() -> None:
    study = optuna.create_study(sampler=sampler(noisy=True))
    generations: dict[int, list[tuple[float | None, tuple[object, ...]]]] = {}

    def objective(trial: Trial) -> float:
        found = loss(bits(trial))
        if study.trials[trial.number].system_attrs.get("evopress:generation") in (2, 3):
            raise RuntimeError("a machine was away")
        return found

    study.optimize(objective, n_trials=60, catch=(RuntimeError,))
    for t in study.trials:
        number = t.system_attrs.get("evopress:generation", -1)
        generations.setdefault(number, []).append((t.value, tuple(t.params.values())))
    best = min((value, params) for value, params in generations[1] if value is not None)[1]
    for number in (2, 3, 4):
        assert best in [params for _, params in generations[number]]


def test_long_axes_move_by_few_steps_and_by_many() -> None:
    for size, most in ((32, 1), (1025, 256)):
        breeder = Breeder([size], None, [], max_switches=1, cross_group=0.0)
        stream, middle = Uniforms(np.random.default_rng(0), block=256), size // 2
        moves = [abs(breeder.child((middle,), stream, lambda _: False)[0] - middle) for _ in range(500)]
        assert min(moves) == 1
        assert most // 2 < max(moves) <= most
        assert sum(move <= most**0.5 for move in moves) >= 200  # log-uniform


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidSettingError, match="groups names typo"):
        sampler(groups={"typo": "a"})
    with pytest.raises(InvalidSettingError, match="cross_group=3"):
        sampler(cross_group=3)
    with pytest.raises(InvalidSettingError, match="costs and budget go together"):
        EvoPressSampler(costs=COSTS)
    with pytest.raises(InvalidSettingError, match="offspring"):
        EvoPressSampler(offspring=0)
    with pytest.raises(InfeasibleError, match="below the cheapest"):
        EvoPressSampler(costs=COSTS, budget=3)
    study = optuna.create_study(sampler=sampler())
    with pytest.raises(InvalidSpaceError, match="layer0"):
        study.ask({"layer0": optuna.distributions.IntDistribution(0, 9)})


def test_a_parameter_that_only_some_trials_have_keeps_the_budget_too() -> None:
    costs = {f"layer{i}": (0, 1, 2) for i in range(4)}

    def objective(trial: Trial) -> float:
        names = list(costs) if trial.number % 2 else list(costs)[:3]
        return -sum(trial.suggest_int(name, 0, 2) for name in names)

    study = optuna.create_study(sampler=EvoPressSampler(costs=costs, budget=4, seed=0))
    study.optimize(objective, n_trials=60)
    assert max(sum(t.params.values()) for t in study.trials) == 4


def test_long_names_that_begin_alike_are_drawn_apart() -> None:
    study = optuna.create_study(sampler=EvoPressSampler(seed=0))
    names = ["model." * 12 + str(i) for i in range(8)]
    trial = study.ask()
    assert len({trial.suggest_int(name, 0, 10**6) for name in names}) > 1
