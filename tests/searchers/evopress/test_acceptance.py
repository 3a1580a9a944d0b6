"""Acceptance sequence by sequence, and starts from curvature."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.problems.synthetic import NoisyProblem, interacting, noisy
from evo_hpo import Assignment, Budget, FunctionProblem, Outcome, SearchResult, search
from evo_hpo.errors import InvalidSettingError
from evo_hpo.record.journal import Journal, search_header
from evo_hpo.search.problem import Minibatch, Problem, Score
from searchers import make_searcher
from searchers.additive.fisher import Fisher
from searchers.evopress.evopress import EvoPress
from tests.searchers.landscapes import pruning_space

STAGES: dict[str, Any] = {"offspring": 8, "survivors": (3, 1), "tokens": (256, 1024)}
BUDGET = 100_000


def _run(problem: Problem, budget: int = BUDGET, seed: int = 1, **settings: Any) -> SearchResult:
    searcher = make_searcher("evopress", problem.space, seed=seed, **{**STAGES, **settings})
    return search(searcher, problem, budget=Budget(tokens=budget), seed=seed)


def _decisions(outcomes: Sequence[Outcome]) -> list[list[list[Outcome]]]:
    """For each generation its batches of the last stage: the parent first, then the offspring, or the winner alone."""
    decided = []
    for _, group in itertools.groupby((o for o in outcomes if o.terms.generation), key=lambda o: o.terms.generation):
        last = [o for o in group if o.terms.stage == 1]
        decided.append([list(batch) for _, batch in itertools.groupby(last, key=lambda o: o.minibatch)])
    return decided


def test_whom_a_run_accepted_is_whom_the_paired_t_test_accepts() -> None:
    problem = noisy(units=20, noise=1.0, seed=1)
    result = _run(problem, 400_000, doubt=0.1, minibatches=4, acceptance="paired")
    decided = _decisions(result.outcomes)
    accepted, grown = [], 0
    for batches, following in itertools.pairwise(decided):
        parent, *offspring = batches[0]
        assert parent.trial.note == "parent"
        winner = min(offspring, key=lambda o: o.loss)
        assert len(batches) <= 4
        assert all([o.trial.levels for o in b] == [parent.trial.levels, winner.trial.levels] for b in batches[1:])
        own, other = [parent, *(b[0] for b in batches[1:])], [winner, *(b[1] for b in batches[1:])]
        old, new = (np.concatenate([o.by_sequence or () for o in side]) for side in (own, other))
        assert len(old) == 16 * len(batches)
        better = stats.ttest_rel(new, old, alternative="less").pvalue <= 0.1 and len(batches) != 3
        now = following[0][0].trial.levels
        assert now == (winner.trial.levels if better else parent.trial.levels)
        accepted.append(better)
        grown += len(batches) > 1
    assert len(accepted) > 20
    assert 0.1 < np.mean(accepted) < 0.9
    assert grown > 5


def test_parent_and_winner_are_charged_for_every_minibatch_and_for_no_sequence_twice() -> None:
    problem = noisy(units=20, noise=1.0, seed=1)
    result = _run(problem, acceptance="paired")
    more = [batch for batches in _decisions(result.outcomes) for batch in batches[1:]]
    assert more
    assert all([o.tokens for o in batch] == [1024, 1024] for batch in more)
    assert result.ledger is not None
    assert result.ledger.tokens == sum(o.tokens for o in result.outcomes) <= BUDGET
    seeds = [batch[0].minibatch for batches in _decisions(result.outcomes) for batch in batches]
    assert len(set(seeds)) == len(seeds)


class Flat(Problem):
    """Every assignment is as good as every other; a sequence's loss is noise, part of it shared."""

    name = "flat"
    tokens = 1024

    def __init__(self) -> None:
        self.space = pruning_space(14, 5)

    def score(
        self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None
    ) -> Sequence[Score]:
        shape = (len(assignments), minibatch.tokens // 64)
        own, shared = (np.random.default_rng([minibatch.seed, i]).normal(size=shape) for i in (1, 2))
        return [Score(float(x.mean()), minibatch.tokens, by_sequence=tuple(x.tolist())) for x in own + 5 * shared[0]]


@pytest.mark.parametrize("minibatches", [1, 4])
def test_where_nothing_is_better_little_is_accepted(minibatches: int) -> None:
    """The best of 3 looks good in three of four generations; one test of each accepts it in three levels at most."""

    def moves(**settings: Any) -> list[bool]:
        parents = [b[0][0].trial.levels for b in _decisions(_run(Flat(), 2_000_000, **settings).outcomes)]
        return [a != b for a, b in itertools.pairwise(parents)]

    assert np.mean(moves()) == pytest.approx(3 / 4, abs=0.1)
    found = moves(acceptance="paired", doubt=0.02, minibatches=minibatches)
    assert sum(found) <= stats.binom.ppf(0.99, len(found), 3 * 0.02 * minibatches.bit_length())


@pytest.mark.parametrize("fidelity", [True, False])
def test_without_sequences_the_loss_decides_as_published(fidelity: bool) -> None:
    class Whole(NoisyProblem):
        def score(self, *arguments: Any, **more: Any) -> Sequence[Score]:
            return [Score(s.loss, s.tokens) for s in super().score(*arguments, **more)]

    base = noisy(units=20, seed=1)
    problem: Problem = Whole(base.space, base.landscape, noise=0.3)
    if not fidelity:
        problem = FunctionProblem(base.space, base.landscape)
    found = []
    for acceptance in ("loss", "paired"):
        searcher = make_searcher("evopress", problem.space, acceptance=acceptance, **STAGES)
        found.append([o.trial for o in search(searcher, problem, budget=Budget(evaluations=200)).outcomes])
    assert found[0] == found[1]


def test_published_acceptance_asks_for_no_losses_by_sequence() -> None:
    result = _run(noisy(units=20, seed=1))
    assert not any(o.terms.by_sequence or o.by_sequence for o in result.outcomes)


def test_the_worst_can_be_looked_for_sequence_by_sequence() -> None:
    problem = noisy(units=20, noise=0.1, seed=1)
    worst = _run(problem, acceptance="paired", invert=True).best
    assert worst is not None
    assert problem.landscape(worst) > 1.1 * problem.landscape(problem.space.uniform())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"acceptance": "sure"}, "acceptance='sure' must be one of: loss, paired"),
        ({"acceptance": "paired", "doubt": 0.0}, "doubt=0.0 must be above 0 and at most 0.5"),
        ({"acceptance": "paired", "doubt": 0.7}, "doubt=0.7 must be above 0 and at most 0.5"),
        ({"acceptance": "paired", "minibatches": 0}, "minibatches=0 must be an integer of at least 1"),
        ({"acceptance": "paired", "elitism": "none"}, "on ever new text: change elitism"),
        ({"acceptance": "paired", "minibatch": "fixed"}, "on ever new text: change minibatch"),
        ({"acceptance": "paired", "survivors": (3, 2)}, "on ever new text: change survivors"),
        ({"acceptance": "paired", "restart_after": 5}, "on ever new text: change restart_after"),
        ({"init": "fisher", "initial": 4}, "initial=4 needs a start that is drawn"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        EvoPress(pruning_space(14, 5), **{**STAGES, **settings})


# ---------------------------------------------------------------------- starts from curvature


def test_a_start_from_curvature_is_the_solution_of_fisher_and_is_charged() -> None:
    problem = noisy(units=20, seed=1)
    result = _run(problem, init="fisher", initial_share=0.25)
    (measured,) = result.probes
    assert measured.probe.tokens == 8192  # 32 x 256 are the most that a quarter of the budget pays
    assert result.ledger is not None
    assert result.ledger.tokens == measured.sensitivities.tokens + sum(o.tokens for o in result.outcomes)
    assert _run(problem, 8 * BUDGET, init="fisher", initial_share=0.25).probes[0].probe.tokens == 8192
    alone = search(Fisher(problem.space), problem, budget=Budget(tokens=3 * 8192 + 1024), seed=1)
    assert _decisions(result.outcomes)[0][0][0].trial.levels == alone.best
    assert problem.landscape(alone.best or ()) < problem.landscape(problem.space.uniform())


@pytest.mark.parametrize(("budget", "share", "read"), [(24_000, 0.25, 1792), (24_000, 0.5, 3840), (48_000, 0.01, 0)])
def test_a_start_from_curvature_keeps_to_its_share(budget: int, share: float, read: int) -> None:
    problem = noisy(units=20, seed=1)
    result = _run(problem, budget, init="fisher", initial_share=share)
    assert [m.probe.tokens for m in result.probes] == [read] * bool(read)
    assert 3 * read <= share * budget < 3 * (read + 256)
    if not read:
        assert _decisions(result.outcomes)[0][0][0].trial.levels == problem.space.uniform()


@pytest.mark.parametrize("budget", [Budget(evaluations=60), Budget(seconds=0.2)])
def test_a_start_from_curvature_under_other_budgets(budget: Budget) -> None:
    problem = noisy(units=20, seed=1)
    result = search(make_searcher("evopress", problem.space, init="fisher", **STAGES), problem, budget=budget)
    assert len(result.probes) == 1
    assert result.outcomes


def test_a_problem_without_sensitivities_is_refused_by_name() -> None:
    problem = interacting(units=10, seed=0)
    searcher = make_searcher("evopress", problem.space, init="fisher")
    with pytest.raises(InvalidSettingError, match="EvoPress asks for sensitivities, problem 'interacting' has none"):
        search(searcher, problem, budget=Budget(evaluations=100))


def test_resumed_from_its_journal_at_any_batch_it_takes_the_same_decisions(tmp_path: Path) -> None:
    problem = noisy(units=20, noise=1.0, sensitivities="misleading", seed=1)
    settings, budget = {"init": "fisher", "initial_share": 0.25, "acceptance": "paired"}, Budget(tokens=60_000)
    header = search_header("e-s1", "evopress", problem, budget, seed=1)

    def run(path: Path, resume: bool = False) -> list[tuple[Any, ...]]:
        searcher = make_searcher("evopress", problem.space, seed=1, **STAGES, **settings)
        with Journal.open(path, header, resume=resume) as journal:
            found = search(searcher, problem, budget=budget, seed=1, journal=journal)
        return [(o.trial, o.terms, o.loss, o.by_sequence, o.minibatch) for o in found.outcomes]

    whole = run(tmp_path / "whole.jsonl")
    assert any(trial.note == "again" for trial, *_ in whole)
    text = (tmp_path / "whole.jsonl").read_text()
    for share in (0.2, 0.5, 0.8):
        (tmp_path / f"{share}.jsonl").write_text(text[: int(share * len(text))])
        assert run(tmp_path / f"{share}.jsonl", resume=True) == whole
        lines = [(tmp_path / name).read_text().splitlines() for name in ("whole.jsonl", f"{share}.jsonl")]
        assert len(lines[0]) == len(lines[1])
