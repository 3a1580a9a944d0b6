"""EvoPress against brute force and closed forms: optima, stages, what is measured again."""

from __future__ import annotations

import itertools
from math import comb
from typing import Any

import numpy as np
import pytest

from evo_hpo import Allowance, Assignment, Budget, CompressionSpace, FunctionProblem, Outcome, Unit, search
from evo_hpo.errors import InvalidSettingError
from searchers import make_searcher
from searchers.evopress.evopress import EvoPress
from searchers.evopress.mutation import Uniforms, mutation
from tests.searchers.asking import asked
from tests.searchers.landscapes import interacting, mixed_space, pruning_space


def test_it_finds_the_optimum_of_brute_forceable_landscapes() -> None:
    hits = 0
    for seed in range(20):
        space, loss = pruning_space(16, 6), interacting(16, 0.1, seed)
        assert space.count() == comb(16, 6) == 8008
        optimum = min(map(loss, space.enumerate()))
        searcher = make_searcher("evopress", space, seed=seed, offspring=16)
        result = search(searcher, FunctionProblem(space, loss), budget=Budget(evaluations=800))
        assert result.best is not None
        hits += loss(result.best) <= optimum + 1e-12
    assert hits >= 19


def test_restarts_and_wider_mutation_find_more_optima_of_rugged_landscapes() -> None:
    found = {"plain": 0, "restarts": 0}
    for seed in range(20):
        space, loss = pruning_space(16, 6), interacting(16, 0.35, seed)
        optimum = min(map(loss, space.enumerate()))
        for name, settings in (("plain", {}), ("restarts", {"restart_after": 8, "widen_after": 3})):
            searcher = make_searcher("evopress", space, seed=seed, **settings)
            best = search(searcher, FunctionProblem(space, loss), budget=Budget(evaluations=800)).best
            assert best is not None
            found[name] += loss(best) <= optimum + 1e-12
    assert found["restarts"] >= found["plain"]
    assert found["restarts"] >= 18


def test_generations_on_linear_losses_grow_like_the_bound() -> None:
    """Expected generations to the optimum of a linear loss are O(k (n - k) / lambda)."""
    ratios = []
    for n in (12, 24, 48):
        k, generations = n // 4, []
        for seed in range(5):
            weights = np.random.default_rng(seed).gamma(1, 1, n)
            optimum = float(np.sort(weights)[:k].sum())
            space = pruning_space(n, k)
            searcher = make_searcher("evopress", space, seed=seed, offspring=8)
            result = search(
                searcher,
                FunctionProblem(space, lambda a, w=weights: float(w @ (1.0 - np.asarray(a)))),  # type: ignore[misc]
                budget=Budget(evaluations=12 * k * (n - k)),
            )
            best = next(o for o in result.outcomes if o.loss <= optimum + 1e-12)
            generations.append(best.terms.generation)
        ratios.append(float(np.mean(generations)) / (k * (n - k) / 8))
    assert max(ratios) < 4
    assert max(ratios) < 3 * min(ratios)


def test_a_generation_is_scored_in_stages_and_the_parent_joins_the_last() -> None:
    space = mixed_space()
    searcher = make_searcher("evopress", space, seed=0, offspring=8, survivors=(3, 1), tokens=(64, 256))
    allowance = Allowance(tokens=10**6, default_tokens=64)
    first = asked(searcher, allowance)
    assert (first.tokens, len(first)) == (64, 8)
    assert len({t.levels for t in first} | {space.uniform()}) == 9
    searcher.tell([Outcome(t, float(i)) for i, t in enumerate(first)])
    second = asked(searcher, allowance)
    assert [t.levels for t in second] == [space.uniform(), *(t.levels for t in first.trials[:3])]
    assert second.tokens == 256
    searcher.tell([Outcome(t, loss) for t, loss in zip(second, (1.0, 2.0, 0.5, 3.0), strict=True)])
    assert searcher.recommend() == first.trials[1].levels


def test_elitism_by_count_lets_the_parent_into_every_stage_that_keeps_one() -> None:
    space = mixed_space()
    for elitism, expected in (("index", 4), ("count", 5), ("none", 4)):
        searcher = make_searcher("evopress", space, offspring=4, survivors=(1, 1), tokens=(64, 128), elitism=elitism)
        assert len(asked(searcher, Allowance(tokens=10**6, default_tokens=64))) == expected


def test_the_last_generation_shrinks_to_what_can_be_paid() -> None:
    space = mixed_space()
    searcher = make_searcher("evopress", space, offspring=16, survivors=(4, 1), tokens=(512, 2048))
    trials = asked(searcher, Allowance(tokens=6 * 512 + 5 * 2048, default_tokens=512))
    assert len(trials) == 6


@pytest.mark.parametrize("settings", [{"restart_after": 3}, {"widen_after": 3}])
def test_stagnation_cannot_be_told_where_no_parent_joins(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingError, match="elitism"):
        make_searcher("evopress", mixed_space(), elitism="none", **settings)


def test_fewer_mutants_than_offspring_are_all_used_and_none_stops_the_search() -> None:
    space = CompressionSpace([Unit(name=f"layers.{i}.u", costs=(0, 1)) for i in range(3)], 1, floor=1)
    searcher = make_searcher("evopress", space, offspring=64)
    trials = asked(searcher, Allowance(evaluations=1000))
    assert {t.levels for t in trials} == set(space.enumerate())  # the parent and its two neighbours
    alone = CompressionSpace([Unit(name="a", costs=(1, 2)), Unit(name="b", costs=(1, 2), fixed=0)], 3, floor=3)
    for settings in ({}, {"restart_after": 2}, {"survivors": (2, 1), "offspring": 4}, {"preset": "quantization"}):
        stuck = make_searcher("evopress", alone, **settings)
        result = search(stuck, FunctionProblem(alone, sum), budget=Budget(evaluations=1000))
        assert (len(result.outcomes), result.best, result.best_loss) == (1, (1, 0), 1)
        assert "no feasible mutant" in result.stop_reason


@pytest.mark.parametrize("costs", [(2, 4, 8), (2, 3, 4, 8), (1, 2, 4, 8)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"cross_group": 0.0}, {"preset": "quantization"}], ids=str)
def test_units_whose_steps_differ_in_cost_are_searched_to_the_optimum(
    costs: tuple[int, ...], settings: dict[str, object]
) -> None:
    space = CompressionSpace([Unit(f"layers.{i}.m", costs) for i in range(8)], 32)
    harm = np.random.default_rng(1).gamma(1, 1, 8)

    def loss(levels: Assignment) -> float:
        return float(sum(h * 2.0 ** -costs[k] for h, k in zip(harm, levels, strict=True)))

    searcher = make_searcher("evopress", space, seed=0, **settings)
    result = search(searcher, FunctionProblem(space, loss), budget=Budget(evaluations=1200))
    assert result.best_loss == pytest.approx(min(map(loss, space.enumerate())))


def test_from_a_start_that_is_spent_exchanges_within_groups_keep_each_groups_share() -> None:
    units = [
        Unit(f"layers.{i}.m{size}", tuple(size * c for c in (2, 4, 8)), size=size) for i in range(6) for size in (1, 5)
    ]
    space = CompressionSpace.from_average(units, 4)
    parent = space.uniform()
    mutate, stream = mutation(space, "size", 0.0), Uniforms(np.random.default_rng(0))
    small = [i for i, unit in enumerate(units) if unit.size == 1]
    mutants = {m for _ in range(500) if (m := mutate(parent, stream, 2)) is not None and m != parent}
    assert len(mutants) > 50
    assert {sum(space.vectors[i][m[i]][0] for i in small) for m in mutants} == {24}


@pytest.mark.parametrize("offspring", [10**9, 10**30])
def test_a_huge_number_of_offspring_does_not_hold_up_a_small_space(offspring: int) -> None:
    space = CompressionSpace([Unit(f"m{i}", (0, 1)) for i in range(3)], 1)
    searcher = make_searcher("evopress", space, offspring=offspring)
    assert isinstance(searcher, EvoPress)
    draws, mutate = [0], searcher.breeding.mutate

    def counted(*arguments: Any) -> Assignment | None:
        draws[0] += 1
        return mutate(*arguments)

    searcher.breeding.mutate = counted
    result = search(searcher, FunctionProblem(space, sum), budget=Budget(evaluations=10**12))
    assert len(result.outcomes) <= space.count()
    assert draws[0] < 500_000


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"survivors": (4,)},
        {"survivors": (4, 1), "offspring": 16},
        {"init": "trust_region"},
        {"init": "dynamic_programming"},
        {"init": "random", "initial": 16},
        {"restart_after": 20, "widen_after": 3},
        {"invert": True},
    ],
    ids=str,
)
def test_where_losses_are_exact_no_assignment_is_measured_twice(settings: dict[str, Any]) -> None:
    space, loss = pruning_space(16, 6), interacting(16, 0.35, 1)
    searcher = make_searcher("evopress", space, seed=0, **settings)
    outcomes = search(searcher, FunctionProblem(space, loss), budget=Budget(evaluations=300)).outcomes
    assert len({o.trial.levels for o in outcomes}) == len(outcomes) == 300


def test_what_failed_is_not_asked_for_again_where_losses_are_exact() -> None:
    space = pruning_space(12, 4)

    def loss(levels: Assignment) -> float:
        return float("nan") if hash(levels) % 3 else float(sum(i * k for i, k in enumerate(levels)))

    searcher = make_searcher("evopress", space, seed=0)
    outcomes = search(searcher, FunctionProblem(space, loss), budget=Budget(evaluations=200)).outcomes
    assert len({o.trial.levels for o in outcomes}) == len(outcomes) == 200


def test_the_published_search_measures_again() -> None:
    space, loss = pruning_space(12, 4), interacting(12, 0.35, 1)
    searcher = make_searcher("evopress", space, seed=0, revisit=True)
    outcomes = search(searcher, FunctionProblem(space, loss), budget=Budget(evaluations=300)).outcomes
    assert len(outcomes) - len({o.trial.levels for o in outcomes}) > 50


@pytest.mark.parametrize(("units", "dropped"), [(7, 3), (12, 4), (14, 5)])
@pytest.mark.parametrize("offspring", [1, 4])
def test_exact_losses_end_the_search_when_nearly_all_of_the_space_is_measured(
    units: int, dropped: int, offspring: int
) -> None:
    space, loss = pruning_space(units, dropped), interacting(units, 0.35, 0)
    searcher = make_searcher("evopress", space, seed=0, offspring=offspring)
    result = search(searcher, FunctionProblem(space, loss), budget=Budget(evaluations=3 * comb(units, dropped)))
    measured = {o.trial.levels for o in result.outcomes}
    assert len(result.outcomes) == len(measured) >= 0.97 * comb(units, dropped) - 1  # a last one may be missed
    assert "not been measured: restart_after" in result.stop_reason


def test_restarts_go_on_where_switches_within_groups_do_not_reach() -> None:
    units = [Unit(name=f"layers.{i}.u", costs=(0, 1 + i // 3)) for i in range(6)]
    space = CompressionSpace(units, 5)
    found = {}
    for restart_after in (None, 50):
        searcher = make_searcher("evopress", space, seed=0, cross_group=0.0, restart_after=restart_after)
        result = search(searcher, FunctionProblem(space, lambda a: float(sum(a))), budget=Budget(evaluations=200))
        found[restart_after] = len(result.outcomes)
        assert ("restart_after" in result.stop_reason) == (restart_after is None)
    assert found[50] > 2 * found[None]


def test_fresh_data_lets_an_assignment_be_measured_again() -> None:
    space, noise = pruning_space(5, 2), np.random.default_rng(0)  # ten assignments, soon all of them measured
    searcher = make_searcher("evopress", space, seed=0)
    for _ in range(30):
        trials = asked(searcher, Allowance(tokens=10**6, default_tokens=64))
        assert len(trials) >= 2
        searcher.tell([Outcome(t, float(noise.normal())) for t in trials])


def test_inverted_fitness_finds_the_worst() -> None:
    space = pruning_space(10, 3)
    loss = interacting(10, 0.1, 0)
    searcher = make_searcher("evopress", space, seed=0, invert=True)
    best = search(searcher, FunctionProblem(space, loss), budget=Budget(evaluations=600)).best
    assert best is not None
    assert loss(best) == pytest.approx(max(map(loss, space.enumerate())))


def test_all_offspring_failing_keeps_the_parent() -> None:
    space = mixed_space()
    problem = FunctionProblem(space, lambda a: 1.0 if a == space.uniform() else float("nan"))
    result = search(make_searcher("evopress", space, seed=0), problem, budget=Budget(evaluations=200))
    assert result.best == space.uniform()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"survivors": (1, 4)}, "falling"),
        ({"survivors": (4, 1), "tokens": (2048, 512)}, "rising"),
        ({"survivors": (4, 1), "tokens": (512,)}, "one entry"),
        ({"offspring": 0}, "at least 1"),
        ({"group": "colour"}, "size, name, none"),
        ({"preset": "fastest"}, "one of"),
        ({"invert": "False"}, "invert='False' must be true or false"),
        ({"revisit": "maybe"}, "revisit='maybe' must be true or false"),
        ({"generations": "abc"}, "generations='abc' must be an integer"),
        ({"init": "uniform", "initial": 8}, "initial=8 needs a start that is drawn"),
        ({"initial": 8}, "initial=8 needs a start that is drawn"),
        ({"cross_group": "half"}, "cross_group='half' must be a probability"),
        ({"cross_group": 2.0}, "probability"),
        ({"init": "zero"}, "one of"),
        ({"switch_rule": "max"}, "min_of_two"),
        ({"elitism": "maybe"}, "index, count, none"),
        ({"minibatch": "stale"}, "fresh, nested, fixed"),
        ({"initial_tokens": -5}, "at least 1"),
        ({"survivors": [2.5]}, "integer"),
        ({"tokens": [2.5]}, "integer"),
        ({"survivors": 4}, "one entry a stage"),
        ({"cross_group": "half"}, "cross_group|type or value"),
        ({"initial_share": "a"}, "initial_share|type or value"),
    ],
)
def test_wrong_settings_are_refused_with_the_allowed_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        make_searcher("evopress", mixed_space(), **settings)


def test_siblings_are_distinct_over_a_long_search() -> None:
    space = pruning_space(12, 4)
    result = search(
        make_searcher("evopress", space, seed=3, offspring=8),
        FunctionProblem(space, interacting(12, 0.2, 3)),
        budget=Budget(evaluations=400),
    )
    for _, batch in itertools.groupby(result.outcomes, key=lambda o: o.terms.generation):
        levels = [o.trial.levels for o in batch]
        assert len(set(levels)) == len(levels)


def test_where_mutation_finds_nothing_neighbours_are_drawn_at_random() -> None:
    """Eleven raises are always rejected; what is tried instead must not be the same few neighbours each time."""
    space = CompressionSpace([Unit(f"layers.{i}.unit", costs=(1, 2, 3)) for i in range(20)], 40)
    searcher = make_searcher("evopress", space, seed=0, group="none", switch_rule="fixed", max_switches=11, offspring=4)
    problem = FunctionProblem(space, lambda levels: float(sum(k != 1 for k in levels)))  # the start is best
    result = search(searcher, problem, budget=Budget(evaluations=200))
    assert len({o.trial.levels for o in result.outcomes}) > 100
