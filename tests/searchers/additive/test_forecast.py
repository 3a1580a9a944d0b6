"""What gradients foretell, against the landscape that they are of, and the posterior against a dense Gaussian."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.problems.synthetic import noisy
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.space.compression_space import CompressionSpace, Unit
from searchers.additive.forecast import Forecast, smoothed
from searchers.additive.informed import InformedModel

MANY = Minibatch(3, 64 * 4000)


def _curvatures(sequences: int, seed: int) -> tuple[np.ndarray, np.ndarray, CompressionSpace]:
    """Chi-square samples around effects that are nearly a unit's own times a level's."""
    rng = np.random.default_rng(seed)
    truth = rng.gamma(1.0, 1.0, (28, 1)) * 4.0 ** -np.arange(5) * np.exp(0.1 * rng.normal(size=(28, 5)))
    space = CompressionSpace([Unit(f"layers.{i // 7}.role{i % 7}", costs=(1, 2, 3, 4, 5)) for i in range(28)], 84)
    return truth * rng.chisquare(4, (sequences, *truth.shape)) / 4, truth, space


def test_smoothing_over_levels_takes_a_third_off_the_error_of_a_few_sequences() -> None:
    errors = []
    for seed in range(8):
        samples, truth, space = _curvatures(4, seed)
        log = [np.log(e / truth) for e in (samples.mean(axis=0), smoothed(samples, space))]
        errors.append([np.std(x) for x in log])
    plain, smooth = np.mean(errors, axis=0)
    assert smooth < 0.67 * plain


def test_smoothing_leaves_what_is_known_exactly_and_levels_that_are_missing() -> None:
    _, truth, space = _curvatures(4, 0)
    exact = np.repeat(truth[None], 4, axis=0)
    np.testing.assert_allclose(smoothed(exact, space), truth)
    exact[:, 3, 2:] = np.nan
    exact[:, 4, 4] = 0.0
    found = smoothed(exact, space)
    assert np.isnan(found[3, 2:]).all()
    assert found[4, 4] == 0.0
    np.testing.assert_allclose(found[5:], truth[5:])


@pytest.mark.parametrize(("interaction", "tolerance"), [(0.0, 1e-5), (0.05, 0.02)])
def test_curvature_and_slope_tell_every_single_move_from_any_assignment(interaction: float, tolerance: float) -> None:
    """Of losses from 0 to 5; with cross terms the scale of the curvature is no longer exactly 1."""
    problem = noisy(units=8, interaction=interaction, sensitivities="exact", seed=2)
    forecast, at = Forecast(problem.space), (1, 0, 2, 3, 0, 4, 1, 2)
    forecast.add(problem.sensitivities(None, Minibatch(1, 1024)))
    forecast.add(problem.sensitivities(at, Minibatch(2, 1024), kind="kl"))
    base, table = problem.validate(at)["loss"], forecast.table(at)
    for unit in range(8):
        for level in range(5):
            moved = (*at[:unit], level, *at[unit + 1 :])
            assert table[unit, level] == pytest.approx(problem.validate(moved)["loss"] - base, abs=tolerance)


def test_two_noisy_looks_at_the_slope_tell_more_than_one() -> None:
    problem = noisy(units=40, sensitivities="noisy", noise=0.3, seed=2)
    at = problem.space.uniform()
    exact = np.array(
        [[problem.landscape((*at[:u], k, *at[u + 1 :])) for k in range(5)] for u in range(40)]
    ) - problem.landscape(at)
    forecast = Forecast(problem.space)
    forecast.add(problem.sensitivities(None, Minibatch(1, 4096)))
    errors = [np.abs(forecast.table(at) - exact).mean()]
    for seed in (2, 3, 4, 5):
        forecast.add(problem.sensitivities(at, Minibatch(seed, 512), kind="kl"))
        errors.append(np.abs(forecast.table(at) - exact).mean())
    assert errors[4] < errors[0]


def test_a_loss_that_bends_more_than_the_uncompressed_model_does_is_noticed() -> None:
    """As on a real model far from it: slopes are of a landscape that is 1.6 times as steep."""
    problem, at = noisy(units=8, interaction=0.0, sensitivities="exact", seed=2), (1, 0, 2, 3, 0, 4, 1, 2)
    forecast = Forecast(problem.space)
    forecast.add(problem.sensitivities(None, Minibatch(1, 1024)))
    slope = problem.sensitivities(at, Minibatch(2, 1024), kind="kl")
    forecast.add(Sensitivities("kl", at, 1.6 * slope.projections, slope.positions, slope.tokens))
    base, table = problem.validate(at)["loss"], forecast.table(at)
    for unit in range(8):
        for level in range(5):
            moved = (*at[:unit], level, *at[unit + 1 :])
            assert table[unit, level] == pytest.approx(1.6 * (problem.validate(moved)["loss"] - base), abs=1e-4)


def test_parts_tell_the_curvature_and_json_keeps_them() -> None:
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(6, 8, 3, 2)).astype(np.float32)
    found = Sensitivities("sampled", None, parts.sum(axis=1), 10, 180, squares=np.square(parts).sum(axis=1))
    np.testing.assert_allclose(found.curvatures(), (parts.astype(float) ** 2).sum(axis=1) / 20, rtol=1e-6)
    again = Sensitivities.from_json(found.to_json())
    np.testing.assert_array_equal(again.curvatures(), found.curvatures())
    plain = Sensitivities("sampled", None, found.projections, 10, 180)
    np.testing.assert_array_equal(plain.curvatures().mean(axis=0), plain.effects())


def _informed(seed: int = 0) -> tuple[InformedModel, np.ndarray, np.ndarray, np.ndarray]:
    """A model with rows; the table it was told, features of the rows (rows x units x levels) and their values."""
    rng = np.random.default_rng(seed)
    space = CompressionSpace([Unit(f"layers.{i // 7}.role{i % 7}", costs=(1, 2, 3)) for i in range(14)], 28)
    table = np.cumsum(-rng.gamma(1.0, 1.0, (14, 3)), axis=1)
    model, rows, values = InformedModel(space), [], []
    model.inform(table)
    for _ in range(20):
        a, b = space.sample(rng), space.sample(rng)
        one_hot = np.eye(3)[list(a)] - np.eye(3)[list(b)]
        rows.append(one_hot)
        values.append(float((one_hot * table).sum()) + 0.1 * rng.normal())
        model.add(a, b, values[-1])
    return model, table, np.array(rows), np.array(values)


def test_the_posterior_mean_is_that_of_a_dense_gaussian_over_all_effects() -> None:
    model, table, rows, values = _informed()
    model.fit(model.space.uniform())
    shares, decay, noise = model._choice
    assert len(shares) == 7
    assert model.trusted
    steps = np.diff(table, axis=1)
    told = steps / np.sqrt(np.mean(steps**2))
    scale = np.tile(decay ** np.arange(2.0), (14, 1))
    unit, step = np.divmod(np.arange(28), 2)
    same = [
        np.eye(28),
        unit[:, None] == unit,
        (unit % 7)[:, None] * 2 + step[:, None] == (unit % 7) * 2 + step,
        (unit // 7)[:, None] * 2 + step[:, None] == (unit // 7) * 2 + step,
        step[:, None] == step,
    ]
    generic = sum(s * np.asarray(k, dtype=float) for s, k in zip(shares[:5], same, strict=True))
    generic = generic * np.outer(scale.ravel(), scale.ravel()) / np.mean(scale**2)
    prior = generic + shares[5] * np.outer(told, told) + shares[6] * np.diag(told.ravel() ** 2)
    features = rows[:, :, ::-1].cumsum(axis=2)[:, :, ::-1][:, :, 1:].reshape(20, 28)
    at = np.array(model.space.uniform())
    levels = np.array(model._levels), np.array(model._references)
    spread = (levels[0] != levels[1]).sum(axis=1) + 0.5 * np.minimum(*((x != at).sum(axis=1) for x in levels))
    errors = np.diag(noise * np.maximum(spread, 1) + 1e-10)
    mean = prior @ features.T @ np.linalg.solve(features @ prior @ features.T + errors, values)
    np.testing.assert_allclose(np.diff(model.effects(), axis=1).ravel(), mean, rtol=1e-6, atol=1e-9)
    draws = [model.effects(np.random.default_rng(s)) for s in range(400)]
    np.testing.assert_allclose(np.mean(draws, axis=0), model.effects(), atol=0.5)


@pytest.mark.parametrize("rows", [4, 12])
@pytest.mark.parametrize("related", [True, False])
def test_the_rows_tell_whether_the_table_is_to_be_trusted(rows: int, related: bool) -> None:
    trusted = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        space = CompressionSpace([Unit(f"layers.{i // 7}.role{i % 7}", costs=(1, 2, 3)) for i in range(28)], 56)
        truth, other = (np.cumsum(-rng.gamma(1.0, 1.0, (28, 3)), axis=1) for _ in range(2))
        model = InformedModel(space)
        model.inform(truth * np.exp(0.3 * rng.normal(size=(28, 3))) if related else other)
        for _ in range(rows):
            a, b = space.sample(rng), space.sample(rng)
            model.add(a, b, float(truth[range(28), a].sum() - truth[range(28), b].sum()) + 0.3 * rng.normal())
        model.fit(space.uniform())
        trusted += model.trusted
    assert trusted == 10 if related else trusted <= 3
