"""Searches where something goes wrong or is scarce: failed trials, little text, no gradients, floors, threads."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from evo_hpo.errors import EvoHpoError, InvalidSettingError
from evo_hpo.scoring.sampling import check_tokens, sequences_of
from evo_hpo.search.budget import Allowance, Budget
from evo_hpo.search.conformance import SPACES, TokenProblem, loss
from evo_hpo.search.loop import search
from evo_hpo.search.problem import FunctionProblem, Minibatch, Score
from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.search.trial import Outcome, Terms, Trial
from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit
from searchers import make_searcher
from searchers.additive.several import solve_with_prices
from searchers.additive.solvers import solve, solve_by_integer_programming
from searchers.evopress.acceptance import PairedAcceptance
from searchers.evopress.offspring import Candidate
from searchers.foreign.nevergrad_adapter import NevergradSearcher


class Failing(TokenProblem):
    """Uniform compression gives no number."""

    def score(self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None) -> list[Score]:
        uniform = self.space.uniform()
        scores = super().score(assignments, minibatch)
        return [
            Score(math.nan, s.tokens, reason="fails") if tuple(a) == uniform else s
            for a, s in zip(assignments, scores, strict=True)
        ]


@pytest.mark.filterwarnings("ignore:trial 0 failed")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in ("curvature_region", "union:curvature_region", "trust_region", "evopress")),
        *((name, {"prior": False}) for name in ("curvature_region", "union:curvature_region")),
    ],
)
def test_a_start_that_fails_is_left(name: str, settings: dict[str, bool]) -> None:
    space = SPACES["equal"]
    if "union" in name:
        space = CompressionSpace(space.units, space.budgets, floor=space.budget - 4, ranged=True)
    problem = Failing(space)
    result = search(make_searcher(name, space, **settings), problem, budget=Budget(tokens=64 * 200))
    assert result.best is not None
    assert result.best != space.uniform()
    assert sum(o.trial.levels == space.uniform() for o in result.outcomes) < 0.1 * len(result.outcomes)
    assert loss(result.best) < loss(space.uniform())


class Text(TokenProblem):
    """Sequences of some length from a small pool, checked as a language model's are."""

    def __init__(self, space: CompressionSpace, tokens: int, pool: int, length: int) -> None:
        super().__init__(space)
        self.tokens, self.pool_tokens, self._length = tokens, pool, length

    def check(self, tokens: int) -> None:
        check_tokens(tokens, self.pool_tokens // self._length, self._length)

    def score(self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None) -> list[Score]:
        self.check(minibatch.tokens)
        numbers = sequences_of(minibatch, self.pool_tokens // self._length, self._length)
        noise = [np.random.default_rng(n).normal(size=len(self.space)) for n in numbers]
        parts = [tuple(loss(a) + 3 * float(each @ np.array(a)) for each in noise) for a in assignments]
        return [Score(float(np.mean(each)), minibatch.tokens, by_sequence=each) for each in parts]

    def sensitivities(self, assignment: Assignment | None, minibatch: Minibatch, **asked: Any) -> Sensitivities:
        self.check(minibatch.tokens)
        return super().sensitivities(assignment, minibatch, **asked)


@pytest.mark.parametrize(("tokens", "pool", "length"), [(512, 2048, 512), (1000, 100_000, 1000), (384, 38_400, 384)])
def test_races_ask_for_text_that_there_is(tokens: int, pool: int, length: int) -> None:
    space = SPACES["unequal"]
    for seed in range(4):
        problem = Text(space, tokens, pool, length)
        result = search(
            make_searcher("curvature_region", space, seed=seed), problem, budget=Budget(tokens=tokens * 400), seed=seed
        )
        assert max(o.tokens for o in result.outcomes) <= min(pool, 4096)
        assert len({o.terms.stage for o in result.outcomes if o.tokens == pool}) <= 1  # all text is read but once


def test_less_text_than_a_pass_asks_for_is_what_it_costs() -> None:
    space, seen = SPACES["unequal"], list[tuple[int | None, int]]()
    searcher = make_searcher("curvature_region", space)

    class Watch:
        def batch(self, outcomes: Sequence[Outcome], ledger: Any) -> None: ...

        def checkpoint(self, taken: Any) -> None: ...

        def probe(self, measured: Any, ledger: Any) -> None:
            seen.append((searcher.allowance.tokens, ledger.budget.tokens - ledger.tokens))  # type: ignore[attr-defined]

    search(searcher, Text(space, 64, 512, 64), budget=Budget(tokens=64 * 200), observers=[Watch()])
    first, left = seen[0]
    assert first == left


def test_without_a_prior_no_gradients_are_needed() -> None:
    space = SPACES["equal"]
    for name, where in (
        ("curvature_region", space),
        ("curvature_front", CompressionSpace(space.units, space.budgets, floor=space.floor, ranged=True)),
    ):
        problem = FunctionProblem(where, loss)
        result = search(make_searcher(name, where, prior=False), problem, budget=Budget(evaluations=60))
        assert result.outcomes
        with pytest.raises(InvalidSettingError, match="asks for sensitivities"):
            search(make_searcher(name, where), problem, budget=Budget(evaluations=60))


def test_uniform_keeps_a_floor_of_a_resource_that_costs_less_at_higher_levels() -> None:
    space = CompressionSpace([Unit("layers.0.m", ((1, 3), (1, 2), (2, 0)))], (2, 2), floor=(1, 2))
    assert [*space.enumerate()] == [(1,)]
    assert space.uniform() == (1,)
    rng = np.random.default_rng(0)
    for _ in range(200):
        units = [
            Unit(f"layers.{i}.m", tuple((k, int(rng.integers(6))) for k in range(1, 4)))
            for i in range(rng.integers(1, 4))
        ]
        budgets, floors = (tuple(rng.integers(1, high, size=2).tolist()) for high in (12, 5))
        try:
            space = CompressionSpace(units, budgets, floor=floors)
            next(iter(space.enumerate()))
        except (EvoHpoError, StopIteration):
            continue
        assert space.feasible(space.uniform())


def test_passes_of_one_search_of_a_union_are_on_one_minibatch() -> None:
    units = SPACES["unequal"]
    space = CompressionSpace(units.units, units.budgets, floor=30, ranged=True)
    searcher = make_searcher("union:delta_loss", space, budgets=3)
    turns: list[int] = []
    told = searcher.learn_sensitivities

    def learn(found: Sensitivities) -> None:
        turns.append(searcher._turn)  # type: ignore[attr-defined]
        told(found)

    searcher.learn_sensitivities = learn  # type: ignore[method-assign]
    result = search(searcher, TokenProblem(space), budget=Budget(tokens=64 * 300))
    drawn = defaultdict(set)
    for turn, measured in zip(turns, result.probes, strict=True):
        drawn[turn].add(measured.minibatch)
    assert [len(each) for each in drawn.values()] == [1, 1, 1]
    assert len(set.union(*drawn.values())) == 3
    assert len(result.probes) > 3


@pytest.mark.parametrize("name", ["union:layerwise", "union:zeroq", "union:fisher"])
def test_a_union_accounts_for_passes_as_they_are_charged(name: str) -> None:
    units = SPACES["unequal"]
    space = CompressionSpace(units.units, units.budgets, floor=30, ranged=True)
    searcher = make_searcher(name, space, budgets=3)
    result = search(searcher, TokenProblem(space), budget=Budget(evaluations=60))
    assert result.ledger is not None
    assert sum(searcher._spent) == result.ledger.evaluations  # type: ignore[attr-defined]


def test_where_a_unit_has_no_level_to_take_there_is_no_solution() -> None:
    space = CompressionSpace([Unit("a", ((1, 0), (2, 1))), Unit("b", ((1, 0), (2, 1)))], (3, 1))
    for solver in (solve, solve_by_integer_programming):
        assert solver(space, [[math.inf] * 2] * 2) is None


@pytest.mark.parametrize("scale", [1e-6, 1e-8, 1e-12])
def test_small_losses_have_the_solutions_of_large_ones(scale: float) -> None:
    rng = np.random.default_rng(3)
    for _ in range(6):
        sizes = rng.integers(500, 4000, size=40).tolist()
        costs = [[(s * k, int(s * (7 - abs(k - 3) * 0.7) + rng.integers(50))) for k in range(2, 7)] for s in sizes]
        units = [Unit(f"layers.{i}.m", tuple(c), size=s) for i, (c, s) in enumerate(zip(costs, sizes, strict=True))]
        space = CompressionSpace(units, (int(3.4 * sum(sizes)), int(0.97 * sum(c[1][1] for c in costs))))
        effects = [np.exp(rng.normal()) * 0.3 ** np.arange(5) for _ in sizes]

        def value(found: Assignment | None, effects: list[Any] = effects) -> float:
            assert found is not None
            return float(sum(e[k] for e, k in zip(effects, found, strict=True)))

        large, small = (solve_with_prices(space, [(by * e).tolist() for e in effects]) for by in (1.0, scale))
        assert value(small) == pytest.approx(value(large), rel=1e-6)


@pytest.mark.parametrize(("minibatches", "expected"), [(3, (3, "offspring")), (4, (4, "offspring"))])
def test_all_minibatches_that_are_paid_are_looked_at(minibatches: int, expected: tuple[int, str]) -> None:
    parent, offspring = Candidate((0,)), Candidate((1,))

    class Owner:
        allowance = Allowance(tokens=10**9, default_tokens=64)

        def trial(self, levels: Assignment, parent: int | None, note: str) -> Trial:
            return Trial(0, levels, parent, note)

    def outcome(levels: Assignment, parts: list[float]) -> Outcome:
        terms = Terms(64, by_sequence=True)
        return Outcome(Trial(0, levels), float(np.mean(parts)), 64, terms=terms, by_sequence=tuple(parts))

    told = iter([[-1.3, 1, -1, -0.1], [-1.2, 1, -1, -0.1], *[[-5, -5.1, -4.9, -5]] * 6])
    first = next(told)
    scored = [(outcome((1,), first), offspring), (outcome((0,), [0.0] * 4), parent)]
    steps = PairedAcceptance(0.16, minibatches).settle(Owner(), scored, parent)  # type: ignore[arg-type]

    def decided() -> tuple[int, str]:
        read = 1
        next(steps)
        while True:
            read += 1
            try:
                steps.send([outcome((0,), [0.0] * 4), outcome((1,), next(told))])
            except StopIteration as end:
                return read, "offspring" if end.value[0][1] is offspring else "parent"

    assert decided() == expected


def test_every_start_is_scored_also_where_the_incumbent_is_scored_again() -> None:
    units = SPACES["unequal"]
    space = CompressionSpace(units.units, units.budgets, floor=30, ranged=True)
    searcher = make_searcher("nevergrad:DE", space, minibatch="fresh", batch=1)
    result = search(searcher, TokenProblem(space), budget=Budget(tokens=64 * 60))
    assert {*searcher._starts} <= {o.trial.levels for o in result.outcomes}  # type: ignore[attr-defined]


def test_optimizers_in_threads_do_not_share_numpys_generator() -> None:
    def numbers(searcher: NevergradSearcher, found: list[float], after: threading.Barrier | None = None) -> None:
        for _ in range(20):
            with searcher._lent("drawing"):
                found.append(float(np.random.random()))  # noqa: NPY002
                if after is not None:
                    try:
                        after.wait(0.02)  # the other thread cannot be here too
                    except threading.BrokenBarrierError:
                        after.reset()
                found.append(float(np.random.random()))  # noqa: NPY002

    made = [make_searcher("nevergrad:DE", SPACES["equal"], seed=seed) for seed in (0, 0, 1)]
    assert all(isinstance(m, NevergradSearcher) for m in made)
    alone, beside = list[float](), list[float]()
    numbers(made[0], alone)  # type: ignore[arg-type]
    barrier = threading.Barrier(2)
    threads = [
        threading.Thread(target=numbers, args=(m, found, barrier)) for m, found in ((made[1], beside), (made[2], []))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert beside == alone
