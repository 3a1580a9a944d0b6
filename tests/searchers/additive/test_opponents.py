"""The field's own methods: what each finds with exact information, what it pays, and where it is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.problems.landscape import tabular
from benchmarks.problems.synthetic import Landscape, NoisyProblem, additive, noisy
from evo_hpo.errors import InvalidSettingError
from evo_hpo.record.journal import Journal, read_journal, search_header
from evo_hpo.search.budget import Budget
from evo_hpo.search.loop import SearchResult, search
from evo_hpo.search.problem import FunctionProblem, Minibatch
from evo_hpo.search.registry import make_searcher
from evo_hpo.search.trial import Probe
from searchers.additive.augmented_hessian import curvature_with_cross_terms, noise_of_pairs
from searchers.additive.layerwise import Layerwise
from searchers.additive.measured_greedy import MeasuredGreedy

ASKING = ("augmented_hessian", "delta_loss", "fisher", "gradient_threshold", "layerwise", "zeroq")
BUDGET = Budget(tokens=60_000)


def _problem(quality: str = "exact", interaction: float = 0.0, **settings: Any) -> NoisyProblem:
    shape = {"units": 9, "levels": 3, "unequal": True, "noise": 0.0 if quality == "exact" else 0.2, "seed": 3}
    return noisy(interaction=interaction, sensitivities=quality, **{**shape, **settings})


def _run(
    name: str, problem: Any, budget: Budget = BUDGET, *, seed: int = 0, journal: Any = None, **settings: Any
) -> SearchResult:
    searcher = make_searcher(name, problem.space, seed=seed, **settings)
    return search(searcher, problem, budget=budget, seed=seed, journal=journal)


@cache
def _best(problem: NoisyProblem | FunctionProblem) -> float:
    loss: Landscape = problem.landscape if isinstance(problem, NoisyProblem) else problem.function  # type: ignore[assignment]
    return min(loss(a) for a in problem.space.enumerate())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fisher", {}),
        ("fisher", {"effect": "trace"}),
        ("fisher", {"effect": "output", "labels": "true"}),
        ("augmented_hessian", {"most_tokens": 8192}),
        ("augmented_hessian", {}),
        ("delta_loss", {"loss": "kl"}),
        ("zeroq", {}),
    ],
)
def test_exact_information_gives_the_best_of_all_assignments(name: str, settings: dict[str, Any]) -> None:
    problem = _problem()
    best = _run(name, problem, **settings).best
    assert best is not None
    off = 0.01 if name == "augmented_hessian" and not settings else 1e-7  # by the noise of cross terms
    assert problem.landscape(best) == pytest.approx(_best(problem), rel=off)
    assert _best(problem) < 0.9 * problem.landscape(problem.space.uniform())


def test_layerwise_is_best_where_errors_are_all_that_counts_and_searches_for_weights_where_not() -> None:
    errors = np.array([[1.0, 0.25, 0.0]] * 10) * np.linspace(1, 3, 10)[:, None]
    space = noisy(units=10, levels=3).space
    problem = NoisyProblem(space, Landscape(errors, np.ones(10), None), noise=0.0)
    alone = _run("layerwise", problem, search=False)
    assert alone.best is not None
    assert problem.landscape(alone.best) == pytest.approx(_best(problem))
    assert len(alone.outcomes) == 1
    weighted = _problem("noisy")
    plain, found = (_run("layerwise", weighted, search=s) for s in (False, True))
    assert plain.outcomes[0].trial.levels == found.outcomes[0].trial.levels
    assert found.best_loss < plain.best_loss
    assert 10 < len(found.outcomes) <= 58  # weights that lead to a known assignment cost nothing


def test_measured_greedy_is_exact_where_gains_fall_and_units_cost_alike() -> None:
    problem = additive(units=10, levels=3, seed=1)
    result = _run("measured_greedy", problem, Budget(evaluations=100), power=1.0)
    assert result.best_loss == pytest.approx(_best(problem))
    assert len(result.outcomes) == 1 + 10 * 2 + 1


@pytest.mark.parametrize(("trials", "measured", "raised"), [(22, 20, 1), (21, 10, 2), (9, 6, 4), (5, 2, 10)])
def test_measured_greedy_measures_units_together_where_the_budget_is_short(
    trials: int, measured: int, raised: int
) -> None:
    problem = additive(units=10, levels=3, tightness=0.0, seed=1)
    result = _run("measured_greedy", problem, Budget(evaluations=trials))
    base, *others = (o.trial.levels for o in result.outcomes)
    assert base == problem.space.lowest
    assert len(others) in (measured, measured + 1)  # the solution is measured already, or new
    assert {sum(a != b for a, b in zip(o, base, strict=True)) for o in others[:measured]} <= {raised, 10 % raised}


def test_gains_of_a_group_are_shared_by_what_each_unit_costs() -> None:
    problem = additive(units=7, levels=2, unequal=True, seed=1)
    searcher = MeasuredGreedy(problem.space, group=7, power=1.0)
    gains = [[0.0, np.inf] for _ in range(7)]
    searcher._share(gains, (1,) * 7, list(range(7)), -32.0)
    assert [g[1] for g in gains] == [-3.0, -1.0, -1.0, -3.0, -8.0, -8.0, -8.0]


def test_a_threshold_takes_the_steps_of_most_gain_for_their_cost() -> None:
    """Against a listing of all thresholds, and with two levels against the units in order."""
    problem = _problem(tightness=0.5)
    space = problem.space
    result = _run("gradient_threshold", problem)
    gains = -problem.sensitivities(space.lowest, Minibatch(0, 1024), kind="kl").effects()
    rates = np.diff(gains, axis=1) / np.diff(np.array(space.knapsack.first_costs), axis=1)
    feasible = []
    for threshold in rates.ravel():
        levels = tuple(int((rates[u] > threshold).cumprod().sum()) for u in range(9))
        feasible += [levels] if space.feasible(levels) else []
    assert result.best == max(feasible, key=space.cost)
    pair = _run("gradient_threshold", problem, choices=[0, 2]).best
    assert pair is not None
    assert set(pair) == {0, 2}
    high = gains[:, 2] / np.array([costs[2] - costs[0] for costs in space.knapsack.first_costs])
    raised = np.array(pair) == 2
    assert high[raised].min() > high[~raised].max()


def test_cross_terms_bring_the_model_nearer_to_the_loss() -> None:
    problem = _problem("noisy", interaction=0.3, noise=0.0)
    found = problem.sensitivities(None, Minibatch(1, 64 * 4000))
    covariance = (lambda v: v[1] * np.maximum(v[0], 0) @ v[1].T)(np.linalg.eigh(problem.landscape.curvature()))
    model = curvature_with_cross_terms(found, 0.0)
    for levels in list(problem.space.enumerate())[::500]:
        r = problem.landscape.roots[np.arange(9), list(levels)]
        assert model(levels) == pytest.approx(r @ covariance @ r / 2, rel=0.15)
        assert curvature_with_cross_terms(found, 1.0)(levels) == pytest.approx(
            found.effects()[np.arange(9), list(levels)].sum()
        )
    budget, most = Budget(tokens=10**6), 10**6
    exact, diagonal = (_run("augmented_hessian", problem, budget, shrinkage=s, most_tokens=most) for s in (None, 1.0))
    assert exact.best is not None
    assert diagonal.best is not None
    assert problem.landscape(exact.best) < problem.landscape(diagonal.best)


def test_few_sequences_shrink_the_cross_terms_and_many_do_not() -> None:
    problem = _problem("noisy", interaction=0.3)
    found = [problem.sensitivities(None, Minibatch(1, 64 * n)) for n in (1, 16, 2000)]
    one, few, many = (noise_of_pairs(f, problem.space.uniform()) for f in found)
    assert one == 1.0
    assert 0.1 < few < 1.0
    assert 0.0 < many < 0.1


def test_a_quadratic_surrogate_finds_the_best_of_all_assignments_of_a_quadratic_loss() -> None:
    problem = additive(units=8, levels=3, unequal=True, seed=2)
    result = _run("quadratic_surrogate", problem, Budget(evaluations=120))
    assert result.best_loss == pytest.approx(_best(problem))
    once = _run("quadratic_surrogate", problem, Budget(evaluations=120), refine=False)
    assert once.stop_reason == "the quadratic's minimum is measured"
    assert once.best_loss < problem.function(problem.space.uniform())


@pytest.mark.parametrize(
    ("name", "settings", "reads"),
    [
        ("augmented_hessian", {}, 3),
        ("delta_loss", {}, 3 * 3),
        ("fisher", {"effect": "output"}, 3),
        ("gradient_threshold", {}, 3),
        ("zeroq", {}, 4),
    ],
)
def test_all_that_is_read_is_charged(name: str, settings: dict[str, Any], reads: int) -> None:
    result = _run(name, _problem(), Budget(tokens=40_000), **settings)
    ledger, tokens = result.ledger, (40_000 - 1024) // (reads * 1024) * 1024
    assert ledger is not None
    assert ledger.tokens == reads * tokens + 1024 <= 40_000
    assert sum(m.sensitivities.tokens for m in result.probes) == ledger.tokens - 1024
    assert ledger.evaluations == reads + 1


def test_layer_wise_errors_cost_nothing() -> None:
    result = _run("layerwise", _problem(), Budget(tokens=3000))
    assert result.ledger is not None
    assert (result.ledger.tokens, result.ledger.evaluations) == (2048, 2)
    assert result.probes[0].sensitivities.tokens == 0


def test_own_text_is_other_text() -> None:
    """And the labels of text that the model wrote are as good as sampled ones."""
    problem = _problem("noisy")
    own, read = (problem.sensitivities(None, Minibatch(1, 64 * 2000, g), kind="true") for g in (True, False))
    assert (own.tokens, read.tokens) == (4 * 64 * 2000, 3 * 64 * 2000)
    assert not np.array_equal(own.projections, read.projections)
    np.testing.assert_allclose(own.effects(), read.effects(), rtol=0.2, atol=1e-3)


@pytest.mark.parametrize("name", [*ASKING, "measured_greedy", "quadratic_surrogate"])
def test_same_seed_same_trials(name: str) -> None:
    first, again = (_run(name, _problem("noisy"), seed=2) for _ in range(2))
    assert [(o.trial, o.loss) for o in first.outcomes] == [(o.trial, o.loss) for o in again.outcomes]


@pytest.mark.parametrize("name", ["delta_loss", "layerwise", "zeroq"])
def test_every_kind_of_probe_is_replayed_from_the_journal(name: str, tmp_path: Path) -> None:
    problem = _problem("noisy")
    header = search_header(f"{name}-s0", name, problem, BUDGET)
    with Journal.open(tmp_path / "j.jsonl", header) as journal:
        whole = _run(name, problem, journal=journal)
    kept = [m for _, m in read_journal(tmp_path / "j.jsonl").probes]
    assert [m.probe for m in kept] == [m.probe for m in whole.probes]
    assert [m.sensitivities.form for m in kept] == [m.sensitivities.form for m in whole.probes]
    with Journal.open(tmp_path / "j.jsonl", header, resume=True) as journal:
        again = _run(name, problem, journal=journal)
    assert (again.best, again.best_loss) == (whole.best, whole.best_loss)


@pytest.mark.parametrize("name", ASKING)
def test_a_recorded_landscape_is_refused_before_any_work(name: str) -> None:
    problem = tabular()
    with pytest.raises(InvalidSettingError, match="asks for sensitivities, problem .* has none"):
        _run(name, problem, Budget(evaluations=10))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fisher", {"effect": "hessian"}, "effect='hessian' must be one of: projection, trace, output"),
        ("delta_loss", {"loss": "mse"}, "loss='mse' must be one of: cross_entropy, kl"),
        ("gradient_threshold", {"choices": [2, 0]}, r"choices=\[2, 0\] must be two or more levels"),
        ("augmented_hessian", {"shrinkage": 2}, "shrinkage=2 must be a probability"),
        ("measured_greedy", {"power": 0}, "power=0 must be a number above 0"),
        ("layerwise", {"search": "no"}, "search='no' must be true or false"),
        ("zeroq", {"share": 0}, "share=0 must be above 0"),
    ],
)
def test_settings_outside_their_range_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        make_searcher(name, _problem().space, **settings)


def test_what_a_form_cannot_tell_is_refused() -> None:
    problem = _problem()
    found = problem.sensitivities(None, Minibatch(0, 1024), form="output")
    with pytest.raises(InvalidSettingError, match="has no cross terms"):
        found.factors()
    with pytest.raises(InvalidSettingError, match="form='square' must be one of"):
        problem.sensitivities(None, Minibatch(0, 1024), form="square")  # type: ignore[arg-type]
    with pytest.raises(InvalidSettingError, match="'layerwise' is of the uncompressed model"):
        Probe(problem.space.uniform(), "layerwise")
    assert isinstance(make_searcher("layerwise", problem.space), Layerwise)
