"""Sensitivities as a value, and those of synthetic problems against their losses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.problems.synthetic import additive, noisy
from evo_hpo.errors import InvalidSettingError
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.sensitivities import Sensitivities

MANY = Minibatch(3, 64 * 4000)


def _sample() -> Sensitivities:
    rng = np.random.default_rng(0)
    return Sensitivities("sampled", None, rng.normal(size=(6, 3, 2)).astype(np.float32), 10, 180)


def predicted(found: Sensitivities, levels: tuple[int, ...]) -> float:
    """Change of the loss from the reference to these levels, all cross terms counted."""
    return float(np.square(found.factors()[:, np.arange(len(levels)), list(levels)].sum(axis=1)).sum() / 2)


def test_effects_noise_and_cross_terms_are_their_formulas() -> None:
    found = _sample()
    p = found.projections.astype(np.float64)
    for unit in range(3):
        for level in range(2):
            squares = [float(x) ** 2 / 2 / 10 for x in p[:, unit, level]]
            assert found.effects()[unit, level] == pytest.approx(sum(squares) / 6)
            assert found.noise()[unit, level] == pytest.approx(np.var(squares, ddof=1) / 6)
    levels = (1, 0, 1)
    pairs = [(u, v) for u in range(3) for v in range(3)]
    expected = sum(float(p[:, u, levels[u]] @ p[:, v, levels[v]]) for u, v in pairs) / 6 / 10 / 2
    assert predicted(found, levels) == pytest.approx(expected)
    first = Sensitivities("kl", (0, 0, 0), p.astype(np.float32), 10, 180)
    np.testing.assert_allclose(first.effects(), p.mean(axis=0) / 10)


def test_a_single_sequence_says_nothing_of_its_noise() -> None:
    found = Sensitivities("true", None, np.ones((1, 2, 2), dtype=np.float32), 10, 30)
    assert np.isinf(found.noise()).all()


def test_json_gives_the_same_bits_and_the_array_cannot_be_written() -> None:
    found = _sample()
    again = Sensitivities.from_json(json.loads(json.dumps(found.to_json())))
    np.testing.assert_array_equal(again.projections, found.projections)
    assert (again.kind, again.reference, again.positions, again.tokens) == ("sampled", None, 10, 180)
    with pytest.raises(ValueError, match="read-only"):
        found.projections[0, 0, 0] = 1.0


@pytest.mark.parametrize("interaction", [0.0, 0.05])
def test_exact_ones_of_the_synthetic_problem_are_the_change_of_every_single_move(interaction: float) -> None:
    problem = noisy(units=8, interaction=interaction, sensitivities="exact", seed=2)
    at = problem.space.uniform()
    first, second = (problem.sensitivities(at, Minibatch(1, 1024), kind=k) for k in ("kl", "sampled"))
    assert first.tokens == second.tokens == 3072
    base = problem.validate(at)["loss"]
    for unit in range(8):
        for level in range(5):
            moved = (*at[:unit], level, *at[unit + 1 :])
            change = first.effects()[unit, level] + second.effects()[unit, level]
            assert change == pytest.approx(problem.validate(moved)["loss"] - base, abs=1e-6)


def test_noisy_ones_come_near_with_many_sequences_pairs_included() -> None:
    problem = noisy(units=6, interaction=0.05, sensitivities="noisy", seed=2)
    found, dearest = problem.sensitivities(None, MANY), (4,) * 6
    for unit in range(6):
        moved = (*dearest[:unit], 0, *dearest[unit + 1 :])
        error = np.sqrt(found.noise()[unit, 0])
        assert abs(found.effects()[unit, 0] - problem.validate(moved)["loss"]) < 4 * error + 0.01
    levels = (0, 2, 1, 0, 3, 1)
    assert predicted(found, levels) == pytest.approx(problem.validate(levels)["loss"], rel=0.05)


def test_misleading_ones_have_the_same_scale_and_the_wrong_units() -> None:
    right, wrong = (noisy(units=30, sensitivities=q, seed=2).sensitivities(None, MANY) for q in ("noisy", "misleading"))
    one, other = right.effects()[:, 0], wrong.effects()[:, 0]
    np.testing.assert_allclose(np.sort(one), np.sort(other), rtol=0.2)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.5


def test_problems_that_have_none_say_so() -> None:
    problem = additive(units=4)
    assert not problem.has_sensitivities
    with pytest.raises(InvalidSettingError, match="problem 'additive' has no sensitivities"):
        problem.sensitivities(None, Minibatch(0, 64))
    with pytest.raises(InvalidSettingError, match="must be one of: exact, noisy, misleading"):
        noisy(units=4, sensitivities="good").sensitivities(None, Minibatch(0, 64))
