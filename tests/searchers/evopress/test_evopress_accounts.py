"""What EvoPress says of its trials (parents, how many matter) and what it compares: never losses of two fidelities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.problems.synthetic import noisy
from evo_hpo import Allowance, Assignment, Budget, CompressionSpace, Outcome, Searcher, Unit, search
from evo_hpo.errors import BudgetError
from evo_hpo.search.problem import Minibatch, Problem, Score
from searchers import make_searcher
from searchers.evopress.evopress import EvoPress
from tests.searchers.asking import asked
from tests.searchers.landscapes import interacting, mixed_space, pruning_space


class Landscape(Problem):
    """A loss without noise on trials that read tokens; fewer than 1000 tokens make it look smaller by ``bias``."""

    name = "landscape"
    tokens = 1024

    def __init__(self, space: CompressionSpace, *, seed: int = 0, stops: bool = False, bias: float = 0.0) -> None:
        self.space = space
        self.loss = interacting(len(space), 0.2, seed)
        self.stops = stops
        self.bias = bias

    def score(
        self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None
    ) -> Sequence[Score]:
        """Stops all but the best ``keep``, if asked to, at half way to the last of these."""
        losses = [self.loss(a) - (self.bias if minibatch.tokens < 1000 else 0.0) for a in assignments]
        limit = sorted(losses)[min(keep or len(losses), len(losses)) - 1]
        stopped = [self.stops and keep is not None and x > limit for x in losses]
        return [
            Score(limit + 0.5 * (x - limit) if late else x, minibatch.tokens, stopped=late)
            for x, late in zip(losses, stopped, strict=True)
        ]


def run(problem: Problem, evaluations: int = 300, budget: Budget | None = None, **settings: Any) -> list[Outcome]:
    searcher = make_searcher("evopress", problem.space, seed=1, **settings)
    return search(searcher, problem, budget=budget or Budget(evaluations=evaluations)).outcomes


def ancestors(outcomes: Sequence[Outcome], number: int | None) -> list[Assignment]:
    """Assignments from a trial back to the one that names no parent."""
    by_number, chain = {o.trial.number: o.trial for o in outcomes}, []
    while number is not None:
        chain.append(by_number[number].levels)
        number = by_number[number].parent
    return chain


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"minibatch": "fixed"},
        {"survivors": (4, 1), "tokens": (128, 1024)},
        {"survivors": (4, 2, 1), "tokens": (64, 128, 1024), "elitism": "count"},
        {"survivors": (3,)},
        {"init": "dynamic_programming", "initial_share": 0.2},
        {"init": "random", "initial": 6},
    ],
    ids=str,
)
def test_every_chain_of_parents_leads_to_the_start(settings: dict[str, Any]) -> None:
    problem = Landscape(pruning_space(14, 5))
    outcomes = run(problem, **settings)
    last = max(o.terms.stage for o in outcomes)
    bred = [o.trial for o in outcomes if o.terms.generation and o.terms.stage == last]
    numbers = {o.trial.number for o in outcomes}
    starts = set()
    for trial in bred:
        assert trial.parent is None or (trial.parent in numbers and trial.parent < trial.number)
        starts.add(ancestors(outcomes, trial.number)[-1])
    assert len(starts) == 1
    if not settings.get("init"):
        assert starts == {problem.space.uniform()}


def test_after_a_restart_chains_lead_to_where_it_started_anew() -> None:
    outcomes = run(Landscape(pruning_space(12, 4)), offspring=4, restart_after=2)
    orphans = {o.trial.levels for o in outcomes if o.trial.parent is None}
    assert 1 < len(orphans) == sum(o.trial.parent is None for o in outcomes)


@pytest.mark.parametrize("settings", [{}, {"restart_after": 2}, {"invert": True}, {"survivors": (3, 2)}], ids=str)
def test_stopping_early_changes_no_search(settings: dict[str, Any]) -> None:
    """Neither where a champion of earlier starts is scored beside the offspring, nor where the worst are wanted."""
    chosen: dict[str, Any] = {"offspring": 6, "survivors": (1,)} | settings
    plain, stopped = (run(Landscape(pruning_space(12, 4), stops=stops), **chosen) for stops in (False, True))
    assert [(o.trial, o.terms) for o in stopped] == [(o.trial, o.terms) for o in plain]
    assert any(o.status == "stopped" for o in stopped) != bool(settings.get("invert"))


def test_a_start_scored_on_few_tokens_is_scored_again_on_many() -> None:
    """On a fixed minibatch losses are remembered, but one of few tokens is not that of many."""
    problem = Landscape(pruning_space(14, 5), bias=100.0)
    settings: dict[str, Any] = {
        "init": "random",
        "initial": 6,
        "survivors": (2, 1),
        "tokens": (64, 1024),
        "minibatch": "fixed",
    }
    outcomes = run(problem, **settings)
    first = next(o for o in outcomes if o.terms.stage == 1)
    assert first.trial.note == "parent"
    assert first.trial.parent in {o.trial.number for o in outcomes[:6]}
    assert min(o.loss for o in outcomes if o.tokens == 1024) < first.loss
    assert outcomes[-1].trial.levels != first.trial.levels
    same = run(problem, **(settings | {"tokens": (1024, 1024)}))
    assert all(o.trial.note != "parent" for o in same)  # of equal fidelity it is known, and not paid twice


def test_the_worst_is_also_sought_from_where_another_searcher_ends() -> None:
    problem = Landscape(pruning_space(12, 4))
    start = {}
    for invert in (False, True):
        outcomes = run(problem, 120, init="dynamic_programming", invert=invert, offspring=4)
        start[invert] = next(o.loss for o in outcomes if o.trial.note == "parent")
    uniform = problem.loss(problem.space.uniform())
    assert start[False] < uniform < start[True]


@pytest.mark.parametrize("init", ["dynamic_programming", "trust_region"])
def test_under_a_budget_of_seconds_another_searchers_start_ends_too(init: str) -> None:
    problem = Landscape(pruning_space(12, 4))
    searcher = make_searcher("evopress", problem.space, seed=0, init=init)
    assert isinstance(searcher, EvoPress)
    taken = 0
    for o in itertools.islice(iter(lambda: step(searcher, problem), None), 200):
        taken += o
        if searcher.parents:
            break
    assert taken <= 4 * 12 + 17


def step(searcher: Searcher, problem: Landscape) -> int:
    """One batch under a budget that limits no batch; the number of its trials."""
    trials = asked(searcher, Allowance(default_tokens=1024))
    searcher.tell([Outcome(t, problem.loss(t.levels), 1024) for t in trials])
    return len(trials)


def test_the_preset_of_depth_pruning_ends_after_its_published_generations() -> None:
    """k (n - k) / 1.5, attention and MLP modules each dropped k times of n."""
    units = [Unit(f"layers.{b}.{kind}", (0, 1), group=kind) for b in range(8) for kind in ("attn", "mlp")]
    problem = Landscape(CompressionSpace(units, 12, floor=12))
    settings: dict[str, Any] = {"preset": "depth_pruning", "offspring": 4, "initial": 2, "tokens": (64, 1024)}
    outcomes = run(problem, 10_000, **settings)
    assert max(o.terms.generation for o in outcomes) == math.ceil(2 * 6 / 1.5)
    longer = run(problem, 10_000, **settings, generations=11)
    assert max(o.terms.generation for o in longer) == 11
    assert make_searcher("evopress", mixed_space(), preset="depth_pruning").generations == math.inf  # type: ignore[attr-defined]


@pytest.mark.parametrize("budget", [Budget(evaluations=1), Budget(tokens=2048)])
def test_a_budget_that_pays_no_generation_scores_the_start(budget: Budget) -> None:
    problem = noisy(units=8, levels=3, tokens=512)
    searcher = make_searcher("evopress", problem.space, offspring=16, survivors=(4, 1), tokens=(512, 2048))
    result = search(searcher, problem, budget=budget)
    assert [o.trial.levels for o in result.outcomes] == [problem.space.uniform()] == [result.best]
    assert math.isfinite(result.best_loss)


def test_a_budget_that_pays_no_trial_is_refused() -> None:
    problem = noisy(units=8, levels=3, tokens=512)
    searcher = make_searcher("evopress", problem.space, offspring=16, survivors=(4, 1), tokens=(512, 2048))
    with pytest.raises(BudgetError, match="does not pay for one trial of 2048 tokens"):
        search(searcher, problem, budget=Budget(tokens=2047))


def test_nested_minibatches_start_afresh_in_each_generation_even_where_the_first_stage_is_skipped() -> None:
    problem = noisy(units=8, levels=3, tokens=64)
    settings: dict[str, Any] = {"offspring": 2, "survivors": [2, 1], "tokens": [8, 64], "minibatch": "nested"}
    result = search(make_searcher("evopress", problem.space, **settings), problem, budget=Budget(evaluations=30))
    generations: dict[int, list[Outcome]] = {}
    for outcome in result.outcomes:
        generations.setdefault(outcome.terms.generation, []).append(outcome)
    assert all(o.terms.draw == "fresh" for outcomes in generations.values() for o in outcomes)
    assert len({outcomes[0].minibatch for outcomes in generations.values()}) == len(generations) > 5


def test_a_champion_takes_no_place_of_an_offspring_in_early_stages() -> None:
    problem = noisy(units=8, levels=3, tokens=64)
    settings: dict[str, Any] = {"offspring": 6, "survivors": [1, 1], "tokens": [32, 64], "elitism": "count"}
    searcher = make_searcher("evopress", problem.space, seed=1, restart_after=3, **settings)
    result = search(searcher, problem, budget=Budget(evaluations=600))
    batches: dict[tuple[int, int], list[Assignment]] = {}
    for outcome in result.outcomes:
        batches.setdefault((outcome.terms.generation, outcome.terms.stage), []).append(outcome.trial.levels)
    complete = [levels for key, levels in batches.items() if key != max(batches)]
    assert all(len(set(levels)) == len(levels) for levels in complete)
