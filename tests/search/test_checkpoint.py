"""What a front is where a searcher names none, and what is looked at of it."""

from __future__ import annotations

import math

import numpy as np

from benchmarks.problems.synthetic import additive
from evo_hpo.search.budget import Budget
from evo_hpo.search.checkpoint import not_dominated, thinned
from evo_hpo.search.loop import search
from evo_hpo.search.trial import Outcome, Trial
from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit
from evo_hpo.space.ranges import marks, spanning
from searchers import make_searcher

UNITS = [Unit(f"m{i}", (1, 2, 3)) for i in range(4)]
SPACE = spanning(CompressionSpace(UNITS, 5), CompressionSpace(UNITS, 12))


def outcome(levels: Assignment, loss: float, tokens: int = 8) -> Outcome:
    return Outcome(Trial(0, levels), loss, tokens, status="failed" if math.isinf(loss) else "complete")


def test_a_front_without_a_searchers_word_is_what_loses_less_than_all_cheaper_trials() -> None:
    told = [
        outcome((1, 0, 0, 0), 5.0),
        outcome((0, 1, 0, 0), 4.0),
        outcome((1, 1, 0, 0), 4.0),
        outcome((1, 1, 1, 0), 3.0),
        outcome((1, 1, 1, 0), 2.5),
        outcome((2, 1, 1, 0), math.inf),
        outcome((2, 2, 2, 2), 0.1, tokens=4),
    ]
    assert not_dominated(SPACE, told) == [(0, 1, 0, 0), (1, 1, 1, 0)]
    assert not_dominated(SPACE, []) == []


def test_of_a_front_the_dearest_within_each_mark_is_looked_at() -> None:
    problem = additive(units=12, levels=5, tightness=0.1, tightest=0.9)
    drawn = [problem.space.sample(np.random.default_rng(seed)) for seed in range(300)]
    every = list({problem.space.cost(levels): levels for levels in drawn}.values())
    kept = thinned(problem.space, every)
    costs = [problem.space.cost(a) for a in kept]
    assert costs == sorted(set(costs))
    for mark in marks(problem.space):
        fitting = [c for c in map(problem.space.cost, every) if c <= mark]
        assert not fitting or max(fitting) in costs


def test_a_search_over_a_range_has_a_front_at_every_checkpoint_and_at_its_end() -> None:
    problem = additive(units=12, levels=5, tightness=0.1, tightest=0.9)
    searcher = make_searcher("random", problem.space, seed=1)
    result = search(searcher, problem, budget=Budget(evaluations=60), checkpoints=[0.5, 1.0])
    first, last = (c.front for c in result.checkpoints)
    assert result.front == last
    assert first != last
    for front in (first, last):
        costs = [p.cost for p in front]
        assert costs == sorted(set(costs))
        for point in front:
            assert point.cost == problem.space.cost(point.levels)
            assert point.loss == point.held_out["loss"] == problem.function(point.levels)
    losses = [p.loss for p in last]
    assert losses == sorted(losses, reverse=True)


def test_a_search_at_one_budget_has_no_front() -> None:
    problem = additive(units=12, levels=5)
    result = search(make_searcher("random", problem.space), problem, budget=Budget(evaluations=9), checkpoints=[1.0])
    assert result.front == result.checkpoints[0].front == ()
