"""What each of our own searchers promises, on problems whose optimum is known."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.problems.synthetic import additive, interacting, noisy
from evo_hpo import Budget, CompressionSpace, FunctionProblem, SearchResult, Unit, search
from evo_hpo.errors import InvalidSettingError, UnknownNameError
from evo_hpo.search.problem import Problem
from evo_hpo.search.registry import available_searchers, describe_searcher, make_searcher
from evo_hpo.search.trial import Outcome


def run(name: str, problem: Problem, evaluations: int, seed: int = 0, **settings: Any) -> SearchResult:
    searcher = make_searcher(name, problem.space, seed=seed, **settings)
    return search(searcher, problem, budget=Budget(evaluations=evaluations))


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [
        ("local_search", 400),
        ("simulated_annealing", 400),
        ("genetic", 600),
        ("greedy", 400),
        ("trust_region", 150),
        ("dynamic_programming", 400),
        ("integer_programming", 400),
    ],
)
def test_finds_the_optimum_of_small_problems(name: str, evaluations: int) -> None:
    """Three problems of 11 units; at least two are solved, and the third is within 2 % of uniform's gap."""
    gaps = []
    for seed in range(3):
        problem = interacting(units=11, levels=3, interaction=0.05, seed=seed)
        assert problem.optimum is not None
        result = run(name, problem, evaluations, seed=seed)
        uniform = problem.function(problem.space.uniform())
        gaps.append((result.best_loss - problem.optimum) / (uniform - problem.optimum))
    assert min(gaps) >= -1e-12
    assert sorted(gaps)[1] == pytest.approx(0, abs=1e-9)
    assert max(gaps) < 0.02


@pytest.mark.parametrize("name", ["dynamic_programming", "integer_programming"])
@pytest.mark.parametrize("unequal", [False, True])
def test_plain_solvers_are_exact_on_additive_losses(name: str, unequal: bool) -> None:
    """With every level probed, one solution is the optimum; no interaction, no error."""
    problem = additive(units=21, levels=4, unequal=unequal, seed=1)
    result = run(name, problem, 1000, refine=False, probe_levels=3)
    assert result.best_loss == pytest.approx(problem.optimum)
    assert result.stop_reason == "the model's optimum is measured"
    assert len(result.outcomes) <= 1 + 21 * 2 * 3 + 1


def test_dynamic_and_integer_programming_take_the_same_steps() -> None:
    problem = interacting(units=14, levels=3, seed=2)
    one = run("dynamic_programming", problem, 120)
    other = run("integer_programming", problem, 120)
    assert [o.trial.levels for o in one.outcomes] == [o.trial.levels for o in other.outcomes]


def test_two_resources_are_solved_too() -> None:
    """At most 6 of 10 units kept, and a budget of bits."""
    space = CompressionSpace([Unit(f"m{i}", ((0, 0), (2, 1), (4, 1))) for i in range(10)], (18, 6))
    problem = FunctionProblem(space, lambda a: -sum((i + 1) * k**0.5 for i, k in enumerate(a)))
    best = min(map(problem.function, space.enumerate()))
    for name in ("dynamic_programming", "trust_region", "local_search"):
        assert run(name, problem, 300).best_loss == pytest.approx(best)


def test_brute_force_scores_everything_once_and_refuses_large_spaces() -> None:
    problem = interacting(units=9, levels=2, exact=True, tightness=1 / 3, seed=0)
    result = run("brute_force", problem, 10_000)
    assert len(result.outcomes) == math.comb(9, 3)
    assert len({o.trial.levels for o in result.outcomes}) == math.comb(9, 3)
    assert result.best_loss == pytest.approx(problem.optimum)
    with pytest.raises(InvalidSettingError, match="limit=80"):
        make_searcher("brute_force", problem.space, limit=80)


def test_nothing_is_paid_twice_on_the_fixed_minibatch() -> None:
    problem = interacting(units=10, levels=3, seed=0)
    for name in ("best_of_random", "genetic", "greedy", "local_search", "simulated_annealing", "trust_region"):
        levels = [o.trial.levels for o in run(name, problem, 200).outcomes]
        assert len(levels) == len(set(levels)), name


def test_a_small_space_is_searched_to_its_end() -> None:
    """Seven assignments, a budget of a hundred: the search ends by itself, with the optimum and a reason."""
    problem = FunctionProblem(
        CompressionSpace([Unit(f"m{i}", (0, 1)) for i in range(7)], 1, floor=1), lambda a: float(a.index(1) * 3 % 7)
    )
    for name in ("best_of_random", "genetic", "greedy", "local_search", "simulated_annealing", "trust_region"):
        result = run(name, problem, 100)
        assert result.best_loss == 0.0, name
        assert len(result.outcomes) <= 7
        assert result.stop_reason


def test_the_trust_region_beats_the_plain_additive_optimum_under_interactions() -> None:
    """At equal evaluations, on average over problems with strong pairwise terms."""
    plain, cautious = 0.0, 0.0
    for seed in range(4):
        problem = interacting(units=40, levels=4, interaction=0.1, seed=seed)
        plain += run("dynamic_programming", problem, 240, refine=False).best_loss
        cautious += run("trust_region", problem, 240).best_loss
    assert cautious < 0.9 * plain


def test_the_trust_region_changes_few_units_at_first() -> None:
    """Before it has grown: at most twice its radius, from an incumbent at most as far away."""
    problem = interacting(units=60, seed=1)
    result = run("trust_region", problem, 30, probes=20, radius=3)
    start = problem.space.uniform()
    first = result.outcomes[21:29]
    assert first
    incumbent = min(result.outcomes[:21], key=lambda o: o.loss).trial.levels
    for outcome in first:
        assert sum(a != b for a, b in zip(outcome.trial.levels, incumbent, strict=True)) <= 6
    assert sum(a != b for a, b in zip(incumbent, start, strict=True)) <= 6


@pytest.mark.parametrize("name", ["genetic", "local_search", "simulated_annealing", "trust_region", "best_of_random"])
def test_fresh_minibatches_compare_with_the_incumbent_only_on_the_same_data(name: str) -> None:
    """On noisy losses the incumbent improves in truth, though no two batches can be compared."""
    problem = noisy(units=20, levels=3, seed=0)
    searcher = make_searcher(name, problem.space, seed=0, minibatch="fresh")
    result = search(searcher, problem, budget=Budget(tokens=400 * 1024))
    assert result.best is not None
    by_batch: dict[int, list[Outcome]] = {}
    for outcome in result.outcomes:
        by_batch.setdefault(outcome.minibatch, []).append(outcome)
    assert all(len(batch) > 1 for batch in list(by_batch.values())[:-1])
    uniform = problem.validate(problem.space.uniform())["loss"]
    assert problem.validate(result.best)["loss"] < 0.9 * uniform


@pytest.mark.parametrize("name", ["random", "optuna:random", "nevergrad:RandomSearch"])
def test_independent_draws_name_no_winner_across_minibatches(name: str) -> None:
    """On fresh minibatches the incumbent is scored again in each batch, and the batch's best is recommended."""
    problem = noisy(units=20, levels=3, noise=3.0, seed=0)
    searcher = make_searcher(name, problem.space, seed=0, minibatch="fresh", batch=4)
    result = search(searcher, problem, budget=Budget(tokens=60 * 1024))
    batches: dict[int, list[Outcome]] = {}
    for outcome in result.outcomes:
        batches.setdefault(outcome.minibatch, []).append(outcome)
    incumbent = None
    for batch in batches.values():
        assert incumbent in (None, batch[0].trial.levels)
        incumbent = min(batch, key=lambda o: o.loss).trial.levels
    assert len(batches) > 10
    assert result.best == incumbent


def test_a_kick_that_comes_back_does_not_end_local_search() -> None:
    """In small spaces two exchanges often take each other back; the budget must be spent, or all be known."""
    for seed in range(4):
        problem = interacting(units=7, levels=2, exact=True, tightness=3 / 7, seed=seed)
        result = run("local_search", problem, 34, seed=seed)
        assert len(result.outcomes) == 34, result.stop_reason


def test_greedy_from_the_cheapest_raises_by_measured_rate() -> None:
    """On an additive loss, the classical greedy: the best gain for its cost first, while it fits."""
    gains = [[0.0, 5.0, 6.0], [0.0, 3.0, 5.5], [0.0, 1.0, 1.2]]
    space = CompressionSpace([Unit(f"m{i}", (0, 1, 2)) for i in range(3)], 3)
    problem = FunctionProblem(space, lambda a: -sum(g[k] for g, k in zip(gains, a, strict=True)))
    result = run("greedy", problem, 100, start="cheapest")
    assert result.best == (1, 2, 0)


def test_simulated_annealing_cools() -> None:
    """Early it moves to worse assignments, at the end it hardly does."""
    problem = interacting(units=30, seed=3)
    losses = [o.loss for o in run("simulated_annealing", problem, 800, heat=2.0).outcomes]
    early, late = losses[100:300], losses[-200:]
    assert min(late) < min(early)
    assert sum(late) / len(late) < sum(early) / len(early)


def test_every_setting_is_explained_also_where_it_is_passed_on() -> None:
    own = [name for name in available_searchers() if not name.startswith(("optuna:", "nevergrad:"))]
    described = [describe_searcher(name) for name in own]
    assert {"evopress", "evopress_front", "multi_step:random"} <= set(own)
    assert not [(d.name, key) for d in described for key in d.settings if not d.meanings.get(key)]


def test_settings_are_described_and_checked() -> None:
    described = describe_searcher("multi_step:random")
    assert described.settings["survivors"] == (4, 1)
    assert "batch" in described.settings
    assert "random" in described.summary
    space = interacting(units=6).space
    with pytest.raises(UnknownNameError, match="no setting 'kicks'"):
        make_searcher("local_search", space, kicks=3)
    with pytest.raises(InvalidSettingError, match="batch, best, first"):
        make_searcher("local_search", space, improvement="worst")
    with pytest.raises(InvalidSettingError, match="fixed or fresh"):
        make_searcher("genetic", space, minibatch="same")
    with pytest.raises(InvalidSettingError, match="explore"):
        make_searcher("trust_region", space, explore=2)
    with pytest.raises(UnknownNameError, match="multi_step"):
        make_searcher("multi_step:multi_step:random", space)


def test_annealing_cools_again_where_a_cooling_found_nothing_new() -> None:
    problem = interacting(units=14, levels=2, exact=True, tightness=0.5, seed=0)
    searcher = make_searcher("simulated_annealing", problem.space, seed=0)
    result = search(searcher, problem, budget=Budget(evaluations=3000))
    assert len(result.outcomes) > 1500  # of 3432 assignments; one cooling freezes after a few hundred


def test_local_search_does_not_end_because_it_proves_a_local_optimum_again() -> None:
    """Every start leads back to uniform, whose 2600 neighbours are looked at one by one."""
    space = CompressionSpace([Unit(f"u{i}", (0, 1)) for i in range(100)], 50, floor=50)
    start = space.uniform()
    problem = FunctionProblem(space, lambda levels: sum(a != b for a, b in zip(levels, start, strict=True)))
    searcher = make_searcher("local_search", space, seed=0, improvement="first")
    assert len(search(searcher, problem, budget=Budget(evaluations=4000)).outcomes) == 4000


@pytest.mark.parametrize("name", ["dynamic_programming", "integer_programming"])
@pytest.mark.parametrize("refine", [True, False])
def test_a_start_that_fails_does_not_end_the_probing(name: str, refine: bool) -> None:
    space = CompressionSpace([Unit(f"u{i}", (2, 3, 4)) for i in range(10)], 30)
    failing = space.uniform()

    def loss(levels: tuple[int, ...]) -> float:
        return math.nan if levels == failing else sum((2 - k) ** 2 / (1 + i) for i, k in enumerate(levels))

    best = min(x for a in space.enumerate() if math.isfinite(x := loss(a)))
    result = search(
        make_searcher(name, space, seed=0, refine=refine), FunctionProblem(space, loss), budget=Budget(evaluations=300)
    )
    assert "no probe" not in result.stop_reason
    assert result.best_loss == pytest.approx(best)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("simulated_annealing", {"heat": math.inf}),
        ("simulated_annealing", {"heat": True}),
        ("genetic", {"crossover": True}),
        ("trust_region", {"explore": "all"}),
        ("optuna:random", {"penalty": "a"}),
        ("nevergrad:OnePlusOne", {"sigma": 0}),
        ("evopress", {"initial_share": "x"}),
        ("multi_step:random", {"survivors": 4}),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(name: str, setting: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingError, match=f"{next(iter(setting))}="):
        make_searcher(name, interacting(units=6).space, **setting)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("evopress", {"survivors": (2, 1), "tokens": (64, 256)}, (64, 256)),
        ("evopress", {"survivors": (2, 1), "tokens": (64, 256), "init": "trust_region"}, (64, 256)),
        ("evopress", {}, (None,)),
        ("multi_step:random", {}, (128, 1024)),
        ("multi_step:genetic", {"survivors": (1,), "tokens": 256}, (256,)),
        ("random", {"tokens": 32}, (32,)),
        ("local_search", {}, (None,)),
        ("optuna:random", {"tokens": 32}, (32,)),
        ("uniform", {}, (None,)),
    ],
)
def test_a_searcher_says_on_how_many_tokens_it_may_ask(
    name: str, settings: dict[str, Any], expected: tuple[int | None, ...]
) -> None:
    problem = noisy(units=12, levels=3, tokens=1024)
    searcher = make_searcher(name, problem.space, seed=0, **settings)
    outcomes = search(searcher, problem, budget=Budget(tokens=60 * 1024)).outcomes
    assert searcher.fidelities() == expected
    assert {o.terms.tokens for o in outcomes} == set(expected)
