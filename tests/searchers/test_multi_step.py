"""Multi-step selection around other searchers: stages, charges, and what the inner searcher hears."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import pytest

from benchmarks.problems.synthetic import noisy
from evo_hpo import Allowance, Assignment, Batch, Budget, Outcome, search
from evo_hpo.search.registry import make_problem, make_searcher
from searchers.multi_step import MultiStep


def make(problem: Any, **settings: Any) -> MultiStep:
    searcher = make_searcher("multi_step:random", problem.space, seed=0, **settings)
    assert isinstance(searcher, MultiStep)
    return searcher


def test_stages_have_the_survivors_tokens_and_incumbent_that_were_asked_for() -> None:
    problem = noisy(units=12, levels=3)
    searcher = make(problem, batch=8, survivors=(4, 2, 1), tokens=(64, 256, 1024))
    result = search(searcher, problem, budget=Budget(evaluations=8 + 4 + 2 + 3 * (8 + 4 + 2 + 1)))
    stages = [list(g) for _, g in groupby(result.outcomes, key=lambda o: (o.terms.generation, o.terms.stage))]
    assert [len(s) for s in stages] == [8, 4, 2] + [8, 4, 3] * 3
    assert [s[0].tokens for s in stages] == [64, 256, 1024] * 4
    assert len({s[0].minibatch for s in stages}) == 12
    for before, after in pairwise(stages):
        if after[0].terms.stage:
            best = sorted(before, key=lambda o: o.loss)[: (4, 2)[after[0].terms.stage - 1]]
            asked = {o.trial.levels for o in after}
            assert {o.trial.levels for o in best} <= asked
    winners = [min(s, key=lambda o: o.loss).trial.levels for s in stages[2::3]]
    assert all(winner in {o.trial.levels for o in s} for winner, s in zip(winners, stages[5::3], strict=False))
    assert result.best == winners[-1]


def test_the_inner_searcher_hears_the_final_ranking_on_the_scale_of_the_first_stage() -> None:
    problem = noisy(units=12, levels=3, noise=1.0)
    searcher = make(problem, batch=6, survivors=(3, 1), tokens=(64, 4096))
    heard: list[list[Outcome]] = []
    tell = searcher.searcher.tell

    def spy(outcomes: Sequence[Outcome]) -> None:
        heard.append(list(outcomes))
        tell(outcomes)

    searcher.searcher.tell = spy  # type: ignore[method-assign]
    result = search(searcher, problem, budget=Budget(evaluations=9))
    first, last = result.outcomes[:6], result.outcomes[6:]
    assert [o.trial.levels for o in heard[0]] == [o.trial.levels for o in first]
    assert sorted(o.loss for o in heard[0]) == sorted(o.loss for o in first)
    told = {o.trial.levels: o.loss for o in heard[0]}
    ranking = [o.trial.levels for o in sorted(last, key=lambda o: o.loss)]
    assert sorted(told, key=told.__getitem__)[:3] == ranking
    assert sum(o.tokens for o in heard[0]) == sum(o.tokens for o in result.outcomes)


def test_without_fidelities_of_its_own_it_screens_on_an_eighth_of_the_problems_default() -> None:
    problem = noisy(units=12, levels=3, tokens=1024)
    result = search(make(problem), problem, budget=Budget(tokens=8 * 128 + 4 * 1024))
    assert [o.tokens for o in result.outcomes] == [128] * 8 + [1024] * 4


def test_any_registered_searcher_can_be_wrapped() -> None:
    problem = noisy(units=12, levels=3)
    for name in ("evopress", "trust_region", "optuna:tpe"):
        searcher = make_searcher(f"multi_step:{name}", problem.space, seed=0, tokens=(64, 1024))
        assert search(searcher, problem, budget=Budget(tokens=40 * 1024)).best is not None


def test_the_inner_searcher_is_told_how_many_of_its_trials_all_stages_pay_for() -> None:
    """Eight trials are screened on 128 tokens, four go on to 1024: 5120 tokens for eight trials, later 6144."""
    problem = noisy(units=12, levels=3, tokens=1024)
    searcher = make(problem, batch=8, survivors=(4, 1), tokens=(128, 1024))
    affords: list[int] = []
    ask = searcher.searcher.ask

    def spy(allowance: Allowance) -> Batch | None:
        affords.append(allowance.affords(10**9))
        return ask(allowance)

    searcher.searcher.ask = spy  # type: ignore[method-assign]
    result = search(searcher, problem, budget=Budget(tokens=5120 + 4 * 6144))
    assert sum(o.terms.stage == 0 for o in result.outcomes) == 40
    assert affords[0] == 8 * (5120 + 4 * 6144) // 5120
    assert affords[1:5] == [32, 24, 16, 8]


def test_without_fidelity_nothing_is_screened_and_nothing_measured_again() -> None:
    problem = make_problem("interacting", units=12, seed=0)
    plain = search(make_searcher("random", problem.space, seed=0, batch=8), problem, budget=Budget(evaluations=60))
    result = search(make(problem, batch=8, survivors=(4, 1)), problem, budget=Budget(evaluations=60))
    assert [o.trial.levels for o in result.outcomes] == [o.trial.levels for o in plain.outcomes]
    assert result.best_loss == plain.best_loss == min(o.loss for o in result.outcomes)


@pytest.mark.parametrize("inner", ["evopress", "trust_region"])
def test_an_incumbent_that_is_proposed_again_is_told_with_its_own_rank(inner: str) -> None:
    """Searchers on fresh data score their incumbent in each batch; what wins the last stage must be told the least."""
    problem = noisy(units=12, levels=3, noise=1.0, tokens=1024)
    searcher = make_searcher(f"multi_step:{inner}", problem.space, seed=0)
    assert isinstance(searcher, MultiStep)
    heard: list[tuple[Assignment | None, list[Outcome]]] = []
    tell = searcher.searcher.tell

    def spy(outcomes: Sequence[Outcome]) -> None:
        heard.append((searcher.incumbent, list(outcomes)))
        tell(outcomes)

    searcher.searcher.tell = spy  # type: ignore[method-assign]
    search(searcher, problem, budget=Budget(evaluations=400))
    own = [(winner, told) for winner, told in heard if winner in {o.trial.levels for o in told} and len(told) > 1]
    assert len(own) > 5
    for winner, told in own:
        assert min(told, key=lambda o: o.loss).trial.levels == winner


def test_on_one_fixed_minibatch_the_incumbent_is_not_measured_again() -> None:
    problem = noisy(units=12, levels=3, tokens=1024)
    searcher = make_searcher("multi_step:genetic", problem.space, seed=0, minibatch="fixed")
    result = search(searcher, problem, budget=Budget(evaluations=200))
    asked = [(o.trial.levels, o.tokens) for o in result.outcomes]
    last = [a for a in asked if a[1] == 1024]
    assert len(set(last)) == len(last)
    assert result.best == min((o for o in result.outcomes if o.tokens == 1024), key=lambda o: o.loss).trial.levels
