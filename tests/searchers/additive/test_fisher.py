"""One-shot solutions from curvature, and how a search asks, pays for and replays sensitivities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.problems.synthetic import NoisyProblem, additive, noisy
from evo_hpo.errors import BudgetError, InvalidSettingError, JournalError
from evo_hpo.record.journal import Journal, read_journal, search_header
from evo_hpo.search.budget import Budget, Ledger
from evo_hpo.search.loop import Checkpoint, SearchResult, search
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.sensitivities import Form, Kind, Sensitivities
from evo_hpo.search.trial import Measured, Probe
from evo_hpo.space.compression_space import Assignment
from searchers.additive.fisher import Fisher

BUDGET = Budget(tokens=20_000)


def _problem(quality: str = "exact", interaction: float = 0.0) -> NoisyProblem:
    return noisy(units=12, levels=3, unequal=True, interaction=interaction, noise=0.2, sensitivities=quality, seed=3)


def _run(problem: NoisyProblem, budget: Budget = BUDGET, seed: int = 0, **more: Any) -> SearchResult:
    settings = {k: more.pop(k) for k in list(more) if k in ("labels", "reference", "share", "most_tokens")}
    return search(Fisher(problem.space, **settings), problem, budget=budget, seed=seed, **more)


def test_exact_curvature_of_an_additive_problem_gives_the_best_of_all_assignments() -> None:
    problem = _problem()
    result = _run(problem)
    assert result.best is not None
    losses = [problem.landscape(a) for a in problem.space.enumerate()]
    assert problem.landscape(result.best) == pytest.approx(min(losses), abs=1e-7)
    assert min(losses) < 0.9 * problem.landscape(problem.space.uniform())


def test_a_token_of_the_pass_costs_three_and_the_last_trial_is_always_paid() -> None:
    result = _run(_problem())
    ledger = result.ledger
    assert ledger is not None
    (measured,) = result.probes
    assert measured.sensitivities.tokens == 3 * 6144 == 3 * 6 * 1024
    assert (ledger.tokens, ledger.evaluations) == (3 * 6144 + 1024, 3 + 1)
    half = _run(_problem(), share=0.5)
    assert half.probes[0].probe.tokens == 3 * 1024
    assert _run(_problem(), most_tokens=2048).probes[0].probe.tokens == 2048
    assert _run(_problem(), Budget(tokens=60_000)).probes[0].probe.tokens == 19 * 1024  # no limit but the budget's
    assert _run(_problem(), Budget(evaluations=10)).probes[0].probe.tokens == 8192


@pytest.mark.parametrize("budget", [Budget(tokens=2000), Budget(tokens=4000), Budget(evaluations=3)])
def test_a_budget_that_does_not_pay_for_the_pass_scores_the_uniform_assignment(budget: Budget) -> None:
    result = _run(_problem(), budget)
    assert not result.probes
    assert [o.trial.levels for o in result.outcomes] == [_problem().space.uniform()]
    assert "does not pay for" in result.stop_reason


def test_a_budget_below_one_trial_is_refused_as_of_every_searcher() -> None:
    with pytest.raises(BudgetError, match="does not pay for one trial"):
        _run(_problem(), Budget(tokens=500))


def test_a_pass_reads_no_more_than_the_pool_holds_and_is_charged_for_that() -> None:
    whole = _problem()
    problem = NoisyProblem(whole.space, whole.landscape, noise=0.2)
    problem.pool_tokens = 2048
    result = _run(problem)
    assert result.probes[0].probe.tokens == 2048
    assert result.ledger is not None
    assert result.ledger.tokens == 3 * 2048 + 1024


def test_a_budget_of_more_than_a_synthetic_problem_can_draw_is_no_error() -> None:
    problem = noisy(units=200, seed=1)
    result = search(Fisher(problem.space), problem, budget=Budget(tokens=10**7), seed=1)
    assert result.probes[0].probe.tokens == problem.pool_tokens == 3_200_000


def test_another_seed_draws_another_calibration_sample() -> None:
    found = [_run(_problem("noisy"), seed=s).probes[0].sensitivities.projections for s in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_observers_hear_of_the_pass_before_the_trial_that_follows() -> None:
    heard: list[str] = []

    class Ear:
        def batch(self, outcomes: Any, ledger: Ledger) -> None:
            heard.append(f"{len(outcomes)} trial, {ledger.tokens} tokens")

        def probe(self, measured: Measured, ledger: Ledger) -> None:
            heard.append(f"{measured.probe.kind}, {ledger.tokens} tokens")

        def checkpoint(self, checkpoint: Checkpoint) -> None:
            heard.append("checkpoint")

    _run(_problem(), labels="true", observers=[Ear()])
    assert heard == ["true, 18432 tokens", "1 trial, 19456 tokens"]


class _Counting(NoisyProblem):
    """Counts what it is asked."""

    passes = 0

    def sensitivities(
        self, assignment: Assignment | None, minibatch: Minibatch, *, kind: Kind = "sampled", form: Form = "inner"
    ) -> Sensitivities:
        type(self).passes += 1
        return super().sensitivities(assignment, minibatch, kind=kind, form=form)


def _counting() -> _Counting:
    base = _problem("noisy")
    return _Counting(base.space, base.landscape, noise=0.2, sensitivities="noisy")


@pytest.mark.parametrize("lines", [2, 3, 4])
def test_a_resumed_search_measures_nothing_twice(tmp_path: Path, lines: int) -> None:
    """Cut after the pass, after the trial, and not at all: the same search, and one pass in all."""
    _Counting.passes = 0
    problem = _counting()
    header = search_header("fisher-s0", "fisher", problem, BUDGET)
    path = tmp_path / "whole.jsonl"
    with Journal.open(path, header) as journal:
        whole = _run(problem, journal=journal)
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    with Journal.open(cut, header, resume=True) as journal:
        again = _run(problem, journal=journal)
    assert _Counting.passes == 1
    assert (again.best, again.best_loss) == (whole.best, whole.best_loss)
    assert again.ledger is not None
    assert whole.ledger is not None
    assert again.ledger.tokens == whole.ledger.tokens
    ((before, kept),) = read_journal(cut).probes
    assert before == 0
    np.testing.assert_array_equal(kept.sensitivities.projections, whole.probes[0].sensitivities.projections)


def test_a_journal_of_other_sensitivities_is_refused(tmp_path: Path) -> None:
    problem = _counting()
    header = search_header("fisher-s0", "fisher", problem, BUDGET)
    with Journal.open(tmp_path / "j.jsonl", header) as journal:
        _run(problem, journal=journal)
    with (
        Journal.open(tmp_path / "j.jsonl", header, resume=True) as journal,
        pytest.raises(JournalError, match="is recorded and Probe"),
    ):
        _run(problem, labels="true", journal=journal)


def test_a_problem_without_sensitivities_is_refused_before_any_work() -> None:
    problem = additive(units=6)
    with pytest.raises(InvalidSettingError, match="Fisher asks for sensitivities, problem 'additive' has none"):
        search(Fisher(problem.space), problem, budget=Budget(evaluations=10))


def test_a_probe_that_cannot_be_paid_ends_the_search() -> None:
    class Greedy(Fisher):
        def steps(self) -> Any:
            yield from self.sensitivities(Probe(tokens=8192))

    problem = _problem()
    result = search(Greedy(problem.space), problem, budget=BUDGET)
    assert result.stop_reason == "the budget does not pay for the sensitivities"
    assert not result.outcomes


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"labels": "own"}, "labels='own'"), ({"share": 0.0}, "share=0.0"), ({"reference": "best"}, "reference='best'")],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        Fisher(_problem().space, **settings)
