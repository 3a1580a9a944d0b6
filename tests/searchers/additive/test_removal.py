"""Units that are kept or left out: what curvature at the uncompressed model misses of them, and slopes show."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from benchmarks.problems.noisy_problem import NoisyProblem
from benchmarks.problems.pairwise import Landscape
from benchmarks.problems.synthetic import noisy
from evo_hpo.search.budget import Budget
from evo_hpo.search.loop import search
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.search.trial import Outcome
from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit
from evo_hpo.space.ranges import spanning
from searchers.additive.curvature_region import CurvatureRegion
from searchers.additive.fisher import Fisher
from searchers.additive.forecast import AWAY, MISFIT, SPREAD, Forecast, removes
from searchers.fronts.curvature_front import CurvatureFront

UNITS, DROPPED = 24, 6
HIDDEN = 30.0  # times the curvature that hidden units show at the uncompressed model, that they cost


class Hiding(NoisyProblem):
    """Modules to drop, some of which show next to nothing of what they cost until they are gone."""

    def __init__(self, seed: int = 0, noise: float = 0.1) -> None:
        rng = np.random.default_rng(seed)
        units = [Unit(f"layers.{i // 2}.{'mlp' if i % 2 else 'self_attn'}", costs=(0, 1)) for i in range(UNITS)]
        harms = rng.gamma(2.0, 0.05, UNITS)
        self.hidden = rng.choice(np.argsort(harms)[DROPPED:], 3, replace=False)
        harms[self.hidden] = 1.0
        self.harms = harms
        landscape = Landscape(np.tile([1.0, 0.0], (UNITS, 1)), harms, None)
        kept = UNITS - DROPPED
        super().__init__(CompressionSpace(units, kept, floor=kept), landscape, noise=noise, tokens=256)

    def sensitivities(self, assignment: Assignment | None, minibatch: Minibatch, **how: Any) -> Sensitivities:
        """Curvature at the uncompressed model is too small for hidden units; slopes are right."""
        found = super().sensitivities(assignment, minibatch, **how)
        if assignment is not None:
            return found
        seen = np.ones((UNITS, 1), dtype=np.float32)
        seen[self.hidden] = 1 / np.sqrt(HIDDEN)
        squares = None if found.squares is None else found.squares * seen**2
        return dataclasses.replace(found, projections=found.projections * seen, squares=squares)

    def best(self) -> float:
        """The least loss of all assignments."""
        return float(np.sort(self.harms)[:DROPPED].sum())


def test_a_space_removes_units_only_where_they_are_kept_or_left_out() -> None:
    assert removes(Hiding().space)
    assert not removes(noisy(units=8).space)
    joint = [Unit(f"{i}", costs=(0, 2, 3)) for i in range(4)]
    assert not removes(CompressionSpace(joint, 8))
    pair = [Unit(f"{i}", costs=((0, 1), (1, 0))) for i in range(4)]
    assert not removes(CompressionSpace(pair, (4, 4)))


def _slope(space: CompressionSpace, at: Assignment, gains: dict[int, float]) -> Sensitivities:
    """Four sequences that agree: taking these units back gains so many nats a token, others change nothing."""
    projections = np.zeros((4, len(space), 2), dtype=np.float32)
    for unit, gain in gains.items():
        projections[:, unit, 1] = -gain
    return Sensitivities("kl", at, projections, 1, 12)


def _base(space: CompressionSpace, curvatures: list[float]) -> Sensitivities:
    """Four sequences that agree on the curvature of every unit's removal."""
    projections = np.zeros((4, len(space), 2), dtype=np.float32)
    projections[:, :, 0] = np.sqrt(2 * np.array(curvatures))
    return Sensitivities("sampled", None, projections, 1, 12, squares=projections**2)


def test_a_removed_unit_is_believed_by_its_own_slope_and_the_others_by_what_is_typical() -> None:
    space = CompressionSpace([Unit(f"{i}", costs=(0, 1)) for i in range(6)], 3)
    forecast, at = Forecast(space), (0, 0, 0, 1, 1, 1)
    forecast.add(_base(space, [0.1, 0.1, 0.1, 0.1, 0.2, 0.3]))
    forecast.add(_slope(space, at, {0: 0.2 * 2, 1: 0.2 * 2, 2: 0.2 * 32}))  # bend 2, 2 and 32 times the curvature
    trust = SPREAD**2 / (SPREAD**2 + MISFIT**2)
    found = forecast.curvature(None)[:, 0]
    np.testing.assert_allclose(found, [0.2, 0.2, 0.2 * 16**trust, 0.2, 0.4, 0.6], rtol=1e-5)
    np.testing.assert_allclose(forecast.curvature(at)[3:, 0], AWAY * found[3:], rtol=1e-5)  # to leave one out as well
    table = forecast.table(at)
    assert table[2, 1] < 5 * table[0, 1] < 0 < table[3, 0] < table[4, 0] < table[5, 0]


def test_a_slope_where_a_removed_unit_has_ruined_the_model_says_that_alone() -> None:
    space = CompressionSpace([Unit(f"{i}", costs=(0, 1)) for i in range(6)], 3)
    forecast, at = Forecast(space), (0, 0, 0, 1, 1, 1)
    forecast.add(_base(space, [0.1] * 6))
    before = len(forecast)
    forecast.add(_slope(space, at, {0: 0.2, 1: -20.0, 2: 0.2}))  # "to take it back would cost 20 nats"
    assert len(forecast) == before  # of the other units nothing is believed
    assert forecast.curvature(None)[:, 0] == pytest.approx([0.1, 10.0, 0.1, 0.1, 0.1, 0.1], rel=1e-5)
    assert forecast.table(at)[1, 1] < -5


def test_a_dead_unit_and_a_slope_that_is_not_a_number_spoil_nothing_else() -> None:
    space = CompressionSpace([Unit(f"{i}", costs=(0, 1)) for i in range(6)], 3)
    forecast, at = Forecast(space), (0, 0, 0, 1, 1, 1)
    forecast.add(_base(space, [0.1, 0.1, 0.1, 0.0, 0.2, 0.3]))
    forecast.add(_slope(space, at, {0: 0.4, 1: 0.4, 2: float("nan")}))
    table = forecast.table(at)
    assert np.isfinite(np.delete(table, 2, axis=0)).all()
    assert np.isfinite(np.delete(forecast.table(at, np.random.default_rng(0)), 2, axis=0)).all()
    assert forecast.curvature(None)[4, 0] == pytest.approx(0.4, rel=1e-5)


def test_units_without_a_choice_make_it_no_other_space() -> None:
    units = [Unit("embedding", costs=(1,)), *(Unit(f"{i}", costs=(0, 1)) for i in range(6))]
    space = CompressionSpace(units, 4)
    assert removes(space)
    forecast = Forecast(space)
    forecast.add(_base(space, [0.0, 0.1, 0.1, 0.1, 0.1, 0.2, 0.3]))
    at = (0, 0, 0, 0, 1, 1, 1)
    forecast.add(_slope(space, at, {1: 0.4, 2: 0.4, 3: 0.4}))
    assert np.isfinite(forecast.table(at)).all()


@pytest.mark.parametrize("tokens", [256, 2048])
def test_slopes_are_bought_whatever_a_trial_reads(tokens: int) -> None:
    problem = Hiding(0)
    problem.tokens = tokens
    result = search(CurvatureRegion(problem.space), problem, budget=Budget(tokens=60 * tokens))
    assert len(result.probes) > 2


class Watched(CurvatureRegion):
    """Keeps whether what it recommends was measured, when it moves unmeasured, and whether rows speak against it."""

    def __init__(self, space: CompressionSpace, **settings: Any) -> None:
        super().__init__(space, **settings)
        self.seen: set[Assignment] = set()
        self.measured: list[bool] = []
        self.trusts: list[bool] = []

    def _moves(self) -> bool:
        moved = super()._moves()
        if moved:
            self.measured.append(self.recommend() in self.seen)
        return moved

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        self.seen.update(outcome.trial.levels for outcome in outcomes)
        super().tell(outcomes)

    def _trusts(self) -> bool:
        self.trusts.append(super()._trusts())
        return self.trusts[-1]


def test_many_measurements_do_not_speak_against_a_forecast_that_is_right() -> None:
    problem = Hiding(0)
    searcher = Watched(problem.space)
    search(searcher, problem, budget=Budget(tokens=600 * 256))
    assert searcher.trusts[0]  # asked first when there are as many rows as units


def test_what_is_recommended_was_measured_also_while_it_moves_on_slopes() -> None:
    problem = Hiding(1)
    searcher = Watched(problem.space, seed=1)
    result = search(searcher, problem, budget=Budget(tokens=20_000))
    assert searcher.measured
    assert all(searcher.measured)
    assert result.best in searcher.seen


def test_a_front_is_of_what_was_measured_also_while_a_search_moves_on_slopes() -> None:
    units = Hiding().space.units
    space = spanning(CompressionSpace(units, 14), CompressionSpace(units, 20))
    searcher = CurvatureFront(space, budgets=3)
    for region in searcher.regions:
        region.forecast.add(_base(region.space, [0.1 + 0.01 * unit for unit in range(UNITS)]))
    before = searcher.front()
    assert len(before) > 3
    moved = searcher.regions[-1]
    moved._left = [moved.incumbent]
    moved.incumbent = tuple(reversed(moved.incumbent))
    assert searcher.front() == before


def test_draws_are_around_what_is_expected_by_the_errors_of_what_was_told() -> None:
    space = CompressionSpace([Unit(f"{i}", costs=(0, 1)) for i in range(6)], 3)
    forecast, at = Forecast(space), (0, 0, 0, 1, 1, 1)
    forecast.add(_base(space, [0.1, 0.1, 0.1, 0.1, 0.2, 0.3]))
    forecast.add(_slope(space, at, dict.fromkeys(range(3), 0.2)))
    rng = np.random.default_rng(0)
    draws = np.array([forecast.table(at, rng) for _ in range(3000)])
    np.testing.assert_allclose(draws.mean(axis=0), forecast.table(at), atol=0.01)
    assert (draws[:, 3:, 0].std(axis=0) < 0.5 * forecast.curvature(at)[3:, 0]).all()  # BEND at most
    assert (draws[:, range(6), at] == 0).all()


def test_other_units_are_looked_at_where_they_are_not_ten_times_as_dear() -> None:
    space = CompressionSpace([Unit(f"{i}", costs=(0, 1)) for i in range(6)], 3)
    forecast, at = Forecast(space), (0, 0, 0, 1, 1, 1)
    forecast.add(_base(space, [0.1, 0.1, 0.1, 0.2, 0.3, 9.0]))
    forecast.add(_slope(space, at, dict.fromkeys(range(3), 0.2)))
    assert forecast.shows
    effects = forecast.elsewhere(at)
    losses = {a: sum(effects[range(6), a]) for a in space.enumerate() if sum(a) == 3}
    best = min(losses, key=lambda a: losses[a])
    assert best[3:] == (0, 0, 1)  # but the last one is spared
    assert forecast.table(at)[range(6), best].sum() > 0  # nobody would go there for its loss


def test_the_second_look_is_where_other_units_are_gone() -> None:
    for seed in range(3):
        problem = Hiding(seed)
        result = search(CurvatureRegion(problem.space, seed=seed), problem, budget=Budget(tokens=14_848))
        first, second = (np.array(probe.sensitivities.reference) for probe in result.probes[1:3])
        assert np.sum((first == 0) & (second == 0)) <= 1
        assert sum(second == 0) == DROPPED


def test_further_removals_may_bend_the_loss_more_or_less_than_is_expected() -> None:
    space = CompressionSpace([Unit(f"{i}", costs=(0, 1)) for i in range(6)], 3)
    forecast, at = Forecast(space), (0, 0, 0, 1, 1, 1)
    forecast.add(_base(space, [0.1, 0.1, 0.1, 0.1, 0.2, 0.3]))
    forecast.add(_slope(space, at, dict.fromkeys(range(3), 0.2)))
    less, mean, more = (forecast.table(at, away=away) for away in (0.5, 1.0, 2.0))
    assert (less[3:, 0] < mean[3:, 0]).all()
    assert (mean[3:, 0] < more[3:, 0]).all()
    np.testing.assert_array_equal(less[:3], more[:3])


def test_bends_are_the_solutions_for_each() -> None:
    problem = Hiding(2)
    searcher = CurvatureRegion(problem.space, seed=2)
    search(searcher, problem, budget=Budget(tokens=14_848))
    for away, levels in zip((1.0, 1 / 1.5, 1.5), searcher._bends(), strict=True):
        table = searcher.forecast.table(searcher.incumbent, away=away)
        order = np.argsort(table[:, 0] - table[:, 1])[:DROPPED]  # one budget, equal units: the least are removed
        assert set(np.flatnonzero(np.array(levels) == 0)) == set(order)


class Racing(CurvatureRegion):
    """Its bends would choose exchanges that nothing speaks for; keeps them, the last place, and who is raced."""

    def __init__(self, space: CompressionSpace, **settings: Any) -> None:
        super().__init__(space, **settings)
        self.races: list[tuple[list[Assignment], Assignment, list[Assignment]]] = []

    def _bends(self) -> list[Assignment]:
        gone = self.incumbent.index(0)
        kept = [unit for unit, level in enumerate(self.incumbent) if level][-3:]
        swap = {unit: {gone: 1, unit: 0} for unit in kept}
        return [tuple(swap[unit].get(u, level) for u, level in enumerate(self.incumbent)) for unit in kept]

    def _candidates(self, radius: int) -> list[Assignment]:
        chosen = super()._candidates(radius)
        if self._left:
            self.races.append((self._bends(), self._left[-1], chosen))
        return chosen


@pytest.mark.parametrize("budget", [Budget(tokens=14_848), Budget(tokens=40_000), Budget(evaluations=60)])
def test_a_race_after_moves_holds_what_more_and_less_bend_would_choose_and_the_last_place(budget: Budget) -> None:
    races = []
    for seed in range(4):
        problem = Hiding(seed)
        searcher = Racing(problem.space, seed=seed)
        search(searcher, problem, budget=budget)
        races += searcher.races
    assert races
    for bends, last, chosen in races:
        assert last in chosen
        assert 2 <= len(chosen) <= 4
        assert set(bends[: len(chosen) - 1]) < set(chosen)


@pytest.mark.parametrize(("tokens", "budget"), [(0, Budget(evaluations=120)), (16, Budget(evaluations=60))])
def test_it_moves_on_slopes_whatever_a_budget_counts(tokens: int, budget: Budget) -> None:
    moves = 0
    for seed in range(4):
        problem = Hiding(seed)
        problem.tokens = tokens
        searcher = Watched(problem.space, seed=seed)
        search(searcher, problem, budget=budget)
        moves += len(searcher.measured)
    assert moves > 0


def test_a_dead_unit_does_not_forbid_the_look_elsewhere() -> None:
    space = CompressionSpace([Unit(f"{i}", costs=(0, 1)) for i in range(6)], 3)
    searcher, at = CurvatureRegion(space), (0, 0, 0, 1, 1, 1)
    searcher.forecast.add(_base(space, [0.1, float("nan"), 0.1, 0.2, 0.3, 0.4]))
    searcher.forecast.add(_slope(space, at, dict.fromkeys(range(3), 0.2)))
    searcher.incumbent = at
    assert searcher._solved(searcher.forecast.elsewhere(at)) is not None


def test_it_moves_on_slopes_alone_and_races_before_it_ends() -> None:
    passed_by = 0
    for seed in range(6):
        problem = Hiding(seed)
        result = search(CurvatureRegion(problem.space, seed=seed), problem, budget=Budget(tokens=14_848))
        scored = {outcome.trial.levels for outcome in result.outcomes}
        passed_by += len({probe.sensitivities.reference for probe in result.probes[1:]} - scored)
        assert result.best in scored
    assert passed_by > 0


def test_units_that_hide_what_they_cost_are_found_out() -> None:
    ours, fisher, budget = [], [], Budget(tokens=12_288)
    for seed in range(6):
        problem = Hiding(seed)
        found, single = (search(s(problem.space, seed=seed), problem, budget=budget) for s in (CurvatureRegion, Fisher))
        assert found.best is not None
        assert single.best is not None
        ours.append(problem.landscape(found.best) / problem.best())
        fisher.append(problem.landscape(single.best) / problem.best())
    assert np.median(ours) < 2
    assert np.median(fisher) > 5  # one look at the uncompressed model drops them
