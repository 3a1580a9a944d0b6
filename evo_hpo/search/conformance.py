"""The conformance suite: what every searcher must do, as tests that a third party inherits.

    from evo_hpo.search.conformance import SearcherConformance

    class TestMySearcher(SearcherConformance):
        names = ("my_searcher", "my_searcher:variant")      # registered names, or override ``searcher``
        settings = {"batch": 4}

Needs pytest (in the extra `dev`). Nothing else of this package imports this module.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest

from evo_hpo.search.budget import Allowance, Budget
from evo_hpo.search.loop import Checkpoint, SearchResult, search
from evo_hpo.search.problem import FunctionProblem, Minibatch, Problem, Score
from evo_hpo.search.registry import make_searcher
from evo_hpo.search.searcher import Searcher
from evo_hpo.search.sensitivities import Form, Kind, Sensitivities
from evo_hpo.search.trial import Batch, Measured, Outcome, Probe, Terms, Trial
from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit

Fact = tuple[Trial, Terms, float, tuple[float, ...] | None, int]
"""What a trial, its terms and its minibatch gave."""


def _spaces() -> dict[str, CompressionSpace]:
    sizes = (3, 1, 1, 3, 8)
    unequal = [
        Unit(f"layers.{b}.m{i}", tuple(s * k for k in (2, 3, 4)), size=s) for b in range(2) for i, s in enumerate(sizes)
    ]
    uneven = [
        Unit("layers.0.a", (4, 8), levels=("4", "8")),
        Unit("layers.0.b", (2, 3, 4, 8), fixed=1),
        *(Unit(f"layers.{i}.c", (1, 3, 4, 6, 7)[: 2 + i % 4]) for i in range(1, 9)),
    ]
    two = [Unit(f"layers.{i}.m", ((1, 0), (2, 1), (5, 1))) for i in range(8)]
    return {
        "equal": CompressionSpace([Unit(f"layers.{i}.m", (2, 3, 4, 5)) for i in range(10)], 32),
        "unequal": CompressionSpace.from_average(unequal, 3),
        "exact": CompressionSpace([Unit(f"layers.{i}.m", (0, 1)) for i in range(10)], 6, floor=6),
        "uneven": CompressionSpace(uneven, 32),
        "uneven steps": CompressionSpace([Unit(f"layers.{i}.m", (2, 4, 8)) for i in range(10)], 40),
        "two resources": CompressionSpace(two, (20, 5), resources=("bits", "kept")),
        "three assignments": CompressionSpace([Unit(f"m{i}", (0, 1)) for i in range(3)], 1, floor=1),
        "one assignment": CompressionSpace([Unit(f"m{i}", (1, 2)) for i in range(3)], 3),
    }


SPACES = _spaces()
"""Equal and unequal sizes, an exact cost, fixed units, missing levels, steps of unequal cost, two resources, next to
nothing to search."""


def loss(levels: Assignment) -> float:
    """A loss with interactions between neighbouring units; lower is better."""
    errors = [(1 + i % 3) * 0.5**k for i, k in enumerate(levels)]
    return sum(errors) + 0.3 * sum(math.sin(7 * i) * a * b for i, (a, b) in enumerate(itertools.pairwise(errors)))


class TokenProblem(Problem):
    """A loss that depends a little on each sequence; trials cost tokens, chosen ones fail, and calls are counted."""

    name = "tokens"
    tokens = 64
    sequence = 16
    has_sensitivities = True

    def __init__(self, space: CompressionSpace, fails: str = "none") -> None:
        self.space = space
        self.fails = fails
        self.scored = 0

    def score(
        self, assignments: Sequence[Assignment], minibatch: Minibatch, *, keep: int | None = None
    ) -> Sequence[Score]:
        self.scored += len(assignments)
        return [self._score(a, minibatch) for a in assignments]

    def _score(self, levels: Assignment, minibatch: Minibatch) -> Score:
        if self.fails == "all" or (self.fails == "some" and sum(i * k for i, k in enumerate(levels)) % 3 == 0):
            return Score(math.nan, minibatch.tokens, reason="chosen to fail")
        exact, first = loss(levels), minibatch.seed % 1000
        parts = [
            exact + 0.1 / self.sequence * sum(math.sin(first + s * s + i) * k for i, k in enumerate(levels))
            for s in range(max(1, minibatch.tokens // self.sequence))
        ]
        return Score(math.fsum(parts) / len(parts), minibatch.tokens, by_sequence=tuple(parts))

    def sensitivities(
        self, assignment: Assignment | None, minibatch: Minibatch, *, kind: Kind = "sampled", form: Form = "inner"
    ) -> Sensitivities:
        """Random gradients of four sequences; the error of a level is halved by the next."""
        depth, units = max(len(u.costs) for u in self.space.units), range(len(self.space))
        errors = np.array([[0.5**k if k < len(u.costs) else math.nan for k in range(depth)] for u in self.space.units])
        if kind == "layerwise":
            return Sensitivities(kind, None, errors[None].astype(np.float32), 1, 0)
        at = 0.0 if assignment is None else errors[units, list(assignment)][:, None]
        gradients = np.random.default_rng(minibatch.seed).normal(size=(4, len(self.space), 1)) + (kind == "kl")
        found = gradients * (errors if form == "absolute" else errors - at)
        found = found if form == "inner" else np.abs(found)
        charged = minibatch.tokens * Probe(generated=minibatch.generated).reads
        return Sensitivities(kind, assignment, found.astype(np.float32), 16, charged, form)


class _Tape:
    """A recorder in memory that knows the first outcomes of another search."""

    def __init__(self, known: Sequence[Outcome]) -> None:
        self.known = list(known)

    def recall(self, batch: Batch, minibatch: Minibatch) -> list[Outcome]:
        """The next known outcomes; they must be of these very trials."""
        found = [self.known.pop(0) for _ in batch.trials[: len(self.known)]]
        assert [o.trial for o in found] == list(batch.trials[: len(found)])
        assert all(o.minibatch == minibatch.seed and o.terms == batch.terms for o in found)
        return found

    def recall_probe(self, probe: Probe, minibatch: Minibatch) -> Measured | None:
        """None are kept."""
        return None

    def record_probe(self, measured: Measured) -> None:
        """Not needed."""

    def recall_checkpoint(self, fraction: float, levels: Assignment) -> Checkpoint | None:
        """None are kept."""
        return None

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """Not needed."""

    def record_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Not needed."""

    def finish(self, result: SearchResult) -> None:
        """Not needed."""


def _facts(outcomes: Sequence[Outcome]) -> list[Fact]:
    return [(o.trial, o.terms, o.loss, o.by_sequence, o.minibatch) for o in outcomes]


def _search(suite: type[SearcherConformance], name: str, seed: int) -> SearchResult:
    """A search of the suite's length among units of unequal size; ``seed`` is the searcher's and the minibatches'."""
    problem = TokenProblem(SPACES["unequal"])
    searcher = suite().searcher(name, problem.space, seed)
    return search(searcher, problem, budget=Budget(evaluations=suite.evaluations), seed=seed)


@cache
def _kept(suite: type[SearcherConformance], name: str) -> SearchResult:
    return _search(suite, name, 0)


def _trace(suite: type[SearcherConformance], name: str, seed: int) -> list[Fact]:
    """Trials and losses of a search; runs in spawned processes too."""
    return _facts(_search(suite, name, seed).outcomes)


@cache
def _spawned() -> ProcessPoolExecutor:
    """A fresh interpreter with another hash seed, kept for all tests."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "12345"
    try:
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    finally:
        os.environ.pop("PYTHONHASHSEED")
        if before is not None:
            os.environ["PYTHONHASHSEED"] = before
    return pool


class SearcherConformance:
    """Inherit, and name the searchers; every test runs for each of them.

    Attributes:
        names: registered names, or keys that your ``searcher`` understands.
        settings: given to every searcher.
        evaluations: trials of a search; enough for several batches.
        skip_spaces: names of :data:`SPACES` that the searchers do not support.
    """

    names: ClassVar[Sequence[str]] = ()
    settings: ClassVar[Mapping[str, Any]] = {}
    evaluations: ClassVar[int] = 40
    skip_spaces: ClassVar[Sequence[str]] = ()

    def searcher(self, name: str, space: CompressionSpace, seed: int) -> Searcher:
        """A new searcher; override for one that is not registered."""
        return make_searcher(name, space, seed=seed, **self.settings)

    @classmethod
    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)

        @pytest.fixture(params=cls.names, name="name")
        def name(self: Any, request: pytest.FixtureRequest) -> str:
            return str(request.param)

        cls.name = name  # type: ignore[attr-defined]

    def _first(self, name: str) -> SearchResult:
        """The search that others are compared with, made once; its seed is 0."""
        suite: Any = type(self)
        return _kept(suite, name)

    def _run(self, name: str, problem: Problem, seed: int = 0, **budget: Any) -> SearchResult:
        return search(self.searcher(name, problem.space, seed), problem, budget=Budget(**budget), seed=3)

    @pytest.mark.parametrize("space", SPACES)
    def test_asks_only_feasible_assignments_and_ends(self, name: str, space: str) -> None:
        """Also on spaces with nothing, or next to nothing, to choose."""
        if space in self.skip_spaces:
            pytest.skip("not supported")
        searcher = self.searcher(name, SPACES[space], 0)
        plain = FunctionProblem(SPACES[space], loss)
        problem: Problem = TokenProblem(SPACES[space]) if searcher.asks_for_sensitivities else plain
        assert searcher.recommend() is None or problem.space.feasible(searcher.recommend() or ())
        result = search(searcher, problem, budget=Budget(evaluations=self.evaluations))
        assert result.outcomes or searcher.stop_reason
        assert all(problem.space.feasible(o.trial.levels) for o in result.outcomes)
        assert result.best is not None
        assert problem.space.feasible(result.best)
        assert result.stop_reason

    @pytest.mark.parametrize("evaluations", [1, 2, 7, 23])
    def test_never_overspends_and_is_told_exactly_what_was_paid(self, name: str, evaluations: int) -> None:
        """A budget that ends inside a batch cuts the batch; without a reason to stop, all of it is spent."""
        problem = TokenProblem(SPACES["equal"])
        searcher = self.searcher(name, problem.space, 0)
        asked: list[Batch] = []
        told: list[list[Trial]] = []
        ask, tell = searcher.ask, searcher.tell

        def spy_ask(allowance: Allowance) -> Batch | None:
            batch = ask(allowance)
            asked.extend([] if batch is None else [batch])
            return batch

        def spy_tell(outcomes: Sequence[Outcome]) -> None:
            told.append([o.trial for o in outcomes])
            tell(outcomes)

        searcher.ask, searcher.tell = spy_ask, spy_tell  # type: ignore[method-assign]
        result = search(searcher, problem, budget=Budget(evaluations=evaluations))
        assert problem.scored == len(result.outcomes) <= evaluations
        assert result.ledger is not None
        assert len(result.outcomes) <= result.ledger.evaluations <= evaluations  # probes are paid for too
        assert result.ledger.evaluations == evaluations or searcher.stop_reason
        assert all(batch == list(of.trials[: len(batch)]) for batch, of in zip(told, asked, strict=False))
        assert [t for batch in told for t in batch] == [o.trial for o in result.outcomes]
        numbers = [o.trial.number for o in result.outcomes]
        assert numbers == sorted(set(numbers))

    def test_keeps_to_its_allowance(self, name: str) -> None:
        """Of trials and of tokens."""
        for allowance in (Allowance(evaluations=3, default_tokens=64), Allowance(tokens=3 * 64, default_tokens=64)):
            searcher, problem = self.searcher(name, SPACES["equal"], 0), TokenProblem(SPACES["equal"])
            while (probe := searcher.next_probe(allowance)) is not None:
                assert allowance.affords(probe.reads, probe.tokens) == probe.reads
                allowance = allowance.less(probe.reads, probe.tokens)
                minibatch = Minibatch(0, probe.tokens or 64, probe.generated)
                found = problem.sensitivities(probe.reference, minibatch, kind=probe.kind, form=probe.form)
                searcher.learn_sensitivities(found)
            batch = searcher.ask(allowance)
            assert batch is not None
            assert 1 <= len(batch) <= allowance.affords(len(batch), batch.tokens)

    def test_spends_no_more_tokens_than_it_has(self, name: str) -> None:
        """Whatever fidelity it asks for."""
        problem = TokenProblem(SPACES["unequal"])
        result = self._run(name, problem, tokens=64 * 20 + 17)
        assert sum(o.tokens for o in result.outcomes) <= 64 * 20 + 17

    def test_survives_failed_trials(self, name: str) -> None:
        """And does not recommend one."""
        problem = TokenProblem(SPACES["equal"], fails="some")
        result = self._run(name, problem, evaluations=self.evaluations)
        if any(o.usable for o in result.outcomes):
            assert result.best is not None
            assert any(o.usable and o.trial.levels == result.best for o in result.outcomes)

    def test_survives_when_every_trial_fails(self, name: str) -> None:
        """Whatever it recommends then is feasible."""
        result = self._run(name, TokenProblem(SPACES["equal"], fails="all"), evaluations=self.evaluations)
        assert result.best is None or SPACES["equal"].feasible(result.best)

    def test_same_seed_same_trials_also_in_a_spawned_process(self, name: str) -> None:
        """Another interpreter, another hash seed."""
        here = _facts(self._first(name).outcomes)
        assert here == _trace(type(self), name, 0)
        assert here == _spawned().submit(_trace, type(self), name, 0).result()

    def test_different_seeds_differ(self, name: str) -> None:
        """Seeds of the searcher and of the minibatches, unless the searcher says that it is not random."""
        first = [o.trial.levels for o in self._first(name).outcomes]
        others = ([trial.levels for trial, *_ in _trace(type(self), name, seed)] for seed in (1, 2, 3))
        if self.searcher(name, SPACES["unequal"], 0).random:
            assert any(trace != first for trace in others)
        else:
            assert all(trace == first for trace in others)

    @pytest.mark.parametrize("share", [0.0, 0.37, 0.8, 1.0])
    def test_resumed_by_replay_equals_uninterrupted(self, name: str, share: float) -> None:
        """Known outcomes go through ask and tell; only the rest is scored."""
        whole = self._first(name)
        known = whole.outcomes[: round(share * len(whole.outcomes))]
        problem = TokenProblem(SPACES["unequal"])
        searcher = self.searcher(name, problem.space, 0)
        resumed = search(searcher, problem, budget=Budget(evaluations=self.evaluations), seed=0, journal=_Tape(known))
        assert _facts(resumed.outcomes) == _facts(whole.outcomes)
        assert problem.scored == len(whole.outcomes) - len(known)
        assert resumed.best == whole.best
