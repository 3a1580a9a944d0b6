"""Gradients, then measured steps: what is bought, what is accepted, and what a wrong forecast costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.problems.synthetic import NoisyProblem, noisy
from evo_hpo.errors import InvalidSettingError
from evo_hpo.record.journal import Journal, search_header
from evo_hpo.search.budget import Budget, Ledger
from evo_hpo.search.loop import SearchResult, search
from evo_hpo.space.compression_space import Assignment
from searchers.additive.curvature_region import CurvatureRegion
from searchers.additive.fisher import Fisher

BUDGET = Budget(tokens=60_000)


def _problem(quality: str = "noisy", units: int = 30, seed: int = 0, **more: Any) -> NoisyProblem:
    return noisy(units=units, unequal=True, structure=0.5, sensitivities=quality, seed=seed, **more)


def _run(problem: NoisyProblem, budget: Budget = BUDGET, seed: int = 0, **settings: Any) -> SearchResult:
    journal = settings.pop("journal", None)
    return search(CurvatureRegion(problem.space, seed=seed, **settings), problem, budget=budget, journal=journal)


def _share(problem: NoisyProblem, found: Assignment | None) -> float:
    """True loss over that of uniform compression."""
    assert found is not None
    return problem.landscape(found) / problem.landscape(problem.space.uniform())


@pytest.mark.parametrize("interaction", [0.0, 0.15])
def test_exact_gradients_lead_to_the_best_of_all_assignments(interaction: float) -> None:
    problem = noisy(
        units=11, levels=3, unequal=True, interaction=interaction, noise=0.01, sensitivities="exact", seed=3
    )
    losses = [problem.landscape(a) for a in problem.space.enumerate()]
    best = _run(problem).best
    assert best is not None
    uniform = problem.landscape(problem.space.uniform())
    assert problem.landscape(best) == pytest.approx(min(losses), abs=0.02 * uniform)


def test_slopes_find_what_curvature_of_single_units_cannot_know() -> None:
    """Pairwise terms decide: the first pass knows none of them."""
    with_slopes, without = [], []
    for seed in range(4):
        problem = _problem("exact", interaction=0.1, seed=seed)
        with_slopes.append(_share(problem, _run(problem).best))
        without.append(_share(problem, _run(problem, slopes=False).best))
    assert np.mean(with_slopes) < np.mean(without) - 0.03


@pytest.mark.parametrize(
    ("tokens", "settings", "read"),
    [
        (60_000, {}, 2048),
        (60_000, {"first_tokens": 8192}, 8192),
        (20_000, {"first_tokens": 8192}, 3072),  # half of the budget pays for three times that
    ],
)
def test_the_first_pass_reads_what_it_is_told_and_half_of_the_budget_pays(
    tokens: int, settings: dict[str, int], read: int
) -> None:
    problem = _problem()
    first, *slopes = _run(problem, Budget(tokens=tokens), **settings).probes
    assert first.probe.tokens == read
    assert all((probe.probe.tokens or 0) <= 2048 for probe in slopes)


def test_a_first_pass_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidSettingError, match="first_tokens"):
        CurvatureRegion(_problem().space, first_tokens=0)


def test_it_is_ahead_of_the_one_shot_solution_at_equal_tokens() -> None:
    ours, fisher = [], []
    for seed in range(4):
        problem = _problem(seed=seed)
        ours.append(_share(problem, _run(problem).best))
        fisher.append(_share(problem, search(Fisher(problem.space), problem, budget=BUDGET).best))
    assert np.mean(ours) < np.mean(fisher)


def test_a_misleading_forecast_is_found_out_and_costs_little() -> None:
    ours, blind = [], []
    for seed in range(5):
        problem = _problem("misleading", seed=seed)
        result = _run(problem, Budget(tokens=110_000))
        assert len(result.probes) <= 2
        ours.append(_share(problem, result.best))
        blind.append(_share(problem, _run(problem, Budget(tokens=100_000), prior=False).best))
    assert np.mean(ours) < np.mean(blind) + 0.05


def test_no_more_is_spent_than_the_budget_and_a_small_one_still_ends_in_an_assignment() -> None:
    problem = _problem()
    for tokens in (1024, 3000, 9000, 14_000, 33_000):
        result = _run(problem, Budget(tokens=tokens))
        assert isinstance(result.ledger, Ledger)
        assert result.ledger.tokens <= tokens
        assert result.best is not None
        assert problem.space.feasible(result.best)
    assert _share(problem, _run(problem, Budget(tokens=14_000)).best) < 0.6
    assert _run(problem, Budget(evaluations=20)).best is not None


def test_an_incumbent_moves_only_by_evidence_in_paired_sequences() -> None:
    """Near the best assignment noise is all there is: with racing it does not wander, without it does."""
    kept, wandered = [], []
    for seed in range(4):
        problem = _problem("exact", units=20, interaction=0.0, noise=0.6, seed=seed)
        kept.append(_share(problem, _run(problem, slopes=False).best))
        wandered.append(_share(problem, _run(problem, slopes=False, racing=False).best))
    assert np.mean(kept) <= np.mean(wandered)


def test_the_same_seed_asks_the_same_also_after_a_resumption(tmp_path: Path) -> None:
    problem = _problem()
    header = search_header("ours-s0", "curvature_region", problem, BUDGET)
    path, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    with Journal.open(path, header) as journal:
        whole = _run(problem, journal=journal)
    lines = path.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[: len(lines) // 2]))
    with Journal.open(cut, header, resume=True) as journal:
        again = _run(problem, journal=journal)
    assert [o.trial for o in again.outcomes] == [o.trial for o in whole.outcomes]
    assert [o.trial for o in _run(problem).outcomes] == [o.trial for o in whole.outcomes]
    assert [o.trial for o in _run(problem, seed=1).outcomes] != [o.trial for o in whole.outcomes]
