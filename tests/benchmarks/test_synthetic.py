"""The synthetic problems are what they say: optimum, size, noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.problems.synthetic import additive, interacting, needle, noisy, non_monotone
from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.registry import available_problems, describe_problem, make_problem


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_the_additive_optimum_is_the_best_of_all(unequal: bool, exact: bool) -> None:
    problem = additive(units=9, levels=3, unequal=unequal, exact=exact, seed=4)
    assert problem.optimum == pytest.approx(min(map(problem.function, problem.space.enumerate())))


def test_dropping_6_of_16_has_8008_assignments_and_a_known_optimum() -> None:
    problem = interacting(units=16, levels=2, tightness=0.375, exact=True, interaction=0.1, seed=0)
    assert problem.space.count() == 8008 == math.comb(16, 6)
    assert problem.optimum == pytest.approx(min(map(problem.function, problem.space.enumerate())))


def test_the_interacting_loss_is_its_formula() -> None:
    """Dropped modules cost their own term and one for each pair of dropped modules."""
    problem = interacting(units=5, levels=2, tightness=0.4, interaction=0.3, seed=1)
    rng = np.random.default_rng([1, 2])
    rng.normal(size=7), rng.normal(size=1)
    single, pairs = rng.gamma(1.0, 1.0, 5), rng.normal(0.0, 0.3, (5, 5))
    dropped = (0, 3)
    levels = tuple(0 if i in dropped else 1 for i in range(5))
    assert problem.function(levels) == pytest.approx(single[0] + single[3] + pairs[0, 3])


def test_more_compression_can_be_better_in_the_non_monotone_problem_only() -> None:
    def rises(problem: object) -> int:
        space, loss = problem.space, problem.function  # type: ignore[attr-defined]
        start = space.uniform()
        lowered = [(*start[:i], start[i] - 1, *start[i + 1 :]) for i in range(len(start)) if start[i]]
        return sum(loss(a) < loss(start) for a in lowered)

    assert rises(non_monotone(units=60, share=0.5, interaction=0.0, seed=0)) > 3
    assert rises(additive(units=60, seed=0)) == 0


def test_the_needle_is_a_feasible_secret() -> None:
    problem = needle(units=6, levels=3, radius=2, seed=3)
    losses = [problem.function(a) for a in problem.space.enumerate()]
    assert min(losses) == problem.optimum == 0.0
    assert max(losses) == 1.0


def test_noise_is_shared_by_a_batch_nested_in_tokens_and_falls_with_them() -> None:
    problem = noisy(units=30, seed=0)
    one = problem.space.uniform()
    assert problem.score([one, one], Minibatch(1, 1024))[0] == problem.score([one], Minibatch(1, 1024))[0]
    assert problem.score([one], Minibatch(1, 1024))[0].loss != problem.score([one], Minibatch(2, 1024))[0].loss
    exact = problem.validate(one)["loss"]

    def error(tokens: int) -> float:
        return float(np.std([problem.score([one], Minibatch(s, tokens))[0].loss - exact for s in range(200)]))

    assert error(256) / error(4096) == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("noise", [0.1, 1.5])  # with the second, some units' factors are cut off at zero
def test_sequences_have_losses_of_their_own_whose_mean_is_the_loss(noise: float) -> None:
    problem = noisy(units=30, noise=noise, seed=0)
    a, b = problem.space.uniform(), problem.space.sample(np.random.default_rng(0))
    for tokens in (64, 640, 4096):
        for score in problem.score([a, b], Minibatch(3, tokens)):
            assert score.by_sequence is not None
            assert len(score.by_sequence) == tokens // 64
            assert np.mean(score.by_sequence) == pytest.approx(score.loss, rel=1e-9)


def test_a_nested_minibatch_begins_with_the_same_sequences() -> None:
    problem = noisy(units=30, noise=0.1, seed=0)
    one = problem.space.uniform()
    small, large = (problem.score([one], Minibatch(3, tokens))[0].by_sequence for tokens in (640, 1280))
    assert small is not None
    assert large is not None
    np.testing.assert_allclose(large[:10], small)


@pytest.mark.parametrize("name", ["additive", "interacting", "needle", "noisy", "non_monotone"])
def test_registered_by_name_and_the_same_for_the_same_seed(name: str) -> None:
    assert name in available_problems()
    assert "seed" in describe_problem(name).settings
    one, other = make_problem(name, seed=5), make_problem(name, seed=6)
    assert one.fingerprint() == make_problem(name, seed=5).fingerprint()
    levels = one.space.uniform()
    assert one.validate(levels) == make_problem(name, seed=5).validate(levels)
    assert name == "needle" or one.validate(levels) != other.validate(levels)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidSettingError, match="tightness"):
        additive(tightness=1.5)
    with pytest.raises(InvalidSettingError, match="share"):
        non_monotone(share=2.0)
    for wrong in ({"noise": -1}, {"noise": float("nan")}, {"tokens": 0}, {"interaction": -1.0}, {"seed": -1}):
        with pytest.raises(InvalidSettingError, match=next(iter(wrong))):
            noisy(**wrong)
    with pytest.raises(InvalidSettingError, match=r"minibatch of 10{30} tokens: at most \d+ with 30 units"):
        noisy().check(10**30)
    for wrong in ({"structure": float("inf")}, {"seed": -1}):
        with pytest.raises(InvalidSettingError, match=next(iter(wrong))):
            additive(**wrong)
