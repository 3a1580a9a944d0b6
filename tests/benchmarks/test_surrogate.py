"""The surrogate: a Gaussian process as the textbook has it, and close to a landscape it can represent."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.measurements.landscapes.fitting import fit, optimise
from benchmarks.measurements.landscapes.validation import errors
from benchmarks.problems.bits import bits_space, random_design
from benchmarks.problems.surrogate import Array, Features
from evo_hpo.space.compression_space import CompressionSpace


@pytest.fixture(scope="module")
def space() -> CompressionSpace:
    return bits_space()


@pytest.fixture(scope="module")
def levels(space: CompressionSpace) -> np.ndarray:
    return np.array(random_design(space, 1, 160))


def truth(levels: np.ndarray) -> Array:
    """log KL with additive effects by role and unit, and one interaction."""
    rng = np.random.default_rng(2)
    effects = rng.gamma(1.0, 1.0, 210) * np.exp(rng.normal(0, 0.5, 7))[np.arange(210) % 7] / 210
    energies = 4.0 ** (1.0 - levels)
    return np.asarray(np.exp(-0.2 + (energies - 1) @ effects / 4))


def test_the_design_starts_at_uniform_and_is_feasible(space: CompressionSpace, levels: np.ndarray) -> None:
    assert tuple(levels[0]) == space.uniform() == (1,) * 210
    assert len({tuple(row) for row in levels.tolist()}) == len(levels)
    assert all(space.feasible(row) for row in levels.tolist())


def test_the_quadratic_form_is_the_posterior_mean(space: CompressionSpace, levels: np.ndarray) -> None:
    features, losses = Features.of(space), truth(levels)
    settings = np.concatenate([np.linspace(-5, -1, 10), [-1.0, -4.0]])
    weights, interaction, noise = np.exp(settings[:-2]).reshape(2, 5), np.exp(-1.0), np.exp(-4.0)
    seen, new = levels[:120], levels[120:]

    def prior(a: np.ndarray, b: np.ndarray) -> Array:
        additive = np.zeros((len(a), len(b)))
        for i, row in enumerate(a):
            for f in range(2):
                left = features.table[np.arange(210), row, f]
                right = features.table[np.arange(210)[None, :], b, f]
                alike = sum(w * p for w, p in zip(weights[f], features.parts, strict=True))
                additive[i] += right @ (alike @ left)
        return np.asarray(additive + interaction * additive**2)

    kernel = prior(seen, seen) + noise * np.eye(len(seen))
    ones, y = np.ones(len(seen)), np.log(losses[:120])
    mean = (ones @ np.linalg.solve(kernel, y)) / (ones @ np.linalg.solve(kernel, ones))
    wanted = mean + prior(new, seen) @ np.linalg.solve(kernel, y - mean)
    fitted = fit(features, seen, losses[:120], settings)
    assert fitted.many(new) == pytest.approx(wanted, abs=1e-8)
    assert [fitted(tuple(row)) for row in new.tolist()] == pytest.approx(np.exp(wanted).tolist(), rel=1e-8)


def test_it_predicts_what_it_has_not_seen(space: CompressionSpace, levels: np.ndarray) -> None:
    features, losses = Features.of(space), truth(levels)
    settings = optimise(features, levels[:120], losses[:120], steps=15)
    told = np.exp(fit(features, levels[:120], losses[:120], settings).many(levels[120:]))
    found = errors(told, losses[120:], np.ones(40, dtype=bool))
    assert found["r2"] > 0.9
    assert found["median"] < 0.03
    assert found["rows"] == 40


def test_errors_of_known_predictions() -> None:
    losses = np.array([1.0, 2.0, 4.0, 8.0])
    perfect = errors(losses, losses, np.ones(4, dtype=bool))
    assert perfect["r2"] == 1
    assert perfect["median"] == 0
    assert perfect["spearman"] == pytest.approx(1)
    low = errors(0.9 * losses, losses, np.ones(4, dtype=bool))
    assert low["median"] == pytest.approx(0.1)
    assert low["bias"] == pytest.approx(-0.1)
