"""Generator searchers: when they go on, what they are told, how they end, and that replaying them resumes them."""

from __future__ import annotations

import math

from evo_hpo import Allowance, Assignment, Batch, Budget, CompressionSpace, FunctionProblem, Outcome, Unit, search
from evo_hpo.search.conformance import SearcherConformance, TokenProblem
from evo_hpo.search.procedure import OneFidelity, Procedure, Sampling, Steps

SPACE = CompressionSpace([Unit(f"layers.{i}", (2, 3, 4)) for i in range(6)], 18)


class Climb(OneFidelity):
    """Tries every switch of the incumbent, in random order, until none is better."""

    def steps(self) -> Steps[None]:
        self.incumbent = self.space.uniform()
        better = True
        while better:
            neighbours = list(self.space.switches(self.incumbent))
            shuffled = [neighbours[i] for i in self.rng.permutation(len(neighbours))]
            self.incumbent, _, better = yield from self.improve(shuffled, self.incumbent)


class Draws(Sampling):
    """Independent draws."""

    def sample(self, count: int) -> list[Assignment]:
        return [self.space.sample(self.rng) for _ in range(count)]


class TestGenerators(SearcherConformance):
    names = ("climb", "draws", "fresh draws")
    evaluations = 20

    def searcher(self, name: str, space: CompressionSpace, seed: int) -> Procedure:
        made: dict[str, Procedure] = {
            "climb": Climb(space, seed=seed, batch=3),
            "draws": Draws(space, seed=seed, batch=3),
            "fresh draws": Draws(space, seed=seed, batch=3, minibatch="fresh"),
        }
        return made[name]


class Diary(Procedure):
    """Writes down what it is left and told; pauses before its second batch of three."""

    def steps(self) -> Steps[None]:
        self.left: list[int | None] = [self.allowance.evaluations]
        self.told: list[list[Outcome]] = []
        self.told.append((yield self.propose([self.space.uniform()] * 3)))
        self.left.append(self.allowance.evaluations)
        yield None
        self.left.append(self.allowance.evaluations)
        self.told.append((yield self.propose([self.space.uniform()] * 3)))
        self.stop_reason = "written down"


def ask(searcher: Procedure, evaluations: int) -> Batch:
    batch = searcher.ask(Allowance(evaluations=evaluations))
    assert batch is not None
    return batch


def test_it_goes_on_when_told_and_after_a_pause_when_asked_with_what_is_then_left() -> None:
    searcher = Diary(SPACE)
    first = [Outcome(t, 1.0) for t in ask(searcher, 10)]
    assert not searcher.told
    searcher.tell(first)
    assert searcher.told == [first]
    assert searcher.left == [10, 7]  # counted down by itself
    ask(searcher, 6)  # the loop says that one more is gone
    assert searcher.left == [10, 7, 6]


def test_a_batch_is_cut_to_the_allowance_and_what_is_dropped_takes_no_number() -> None:
    searcher = Diary(SPACE)
    batch = ask(searcher, 2)
    assert [t.number for t in batch] == [0, 1]
    assert ask(searcher, 2) == batch  # asked again without an answer: the same
    searcher.tell([Outcome(t, 1.0) for t in batch])
    assert [len(told) for told in searcher.told] == [2]
    assert [t.number for t in ask(searcher, 9)] == [2, 3, 4]


def test_the_reason_to_stop_is_the_generators_own_or_that_it_converged() -> None:
    diary = search(Diary(SPACE), FunctionProblem(SPACE, sum), budget=Budget(evaluations=99))
    assert (len(diary.outcomes), diary.stop_reason) == (6, "written down")
    climb = search(
        Climb(SPACE), FunctionProblem(SPACE, lambda a: float(a != SPACE.uniform())), budget=Budget(evaluations=99)
    )
    assert climb.stop_reason == "converged"
    assert climb.best == SPACE.uniform()


class Nothing(Procedure):
    """Has nothing to try."""

    def steps(self) -> Steps[None]:
        yield from ()


def test_what_asks_for_nothing_still_scores_uniform() -> None:
    result = search(Nothing(SPACE), FunctionProblem(SPACE, sum), budget=Budget(evaluations=9))
    assert [o.trial.levels for o in result.outcomes] == [SPACE.uniform()]


class Known(OneFidelity):
    """Wants to know the same for ever."""

    def steps(self) -> Steps[None]:
        while True:
            yield from self.measure([self.space.uniform()])


def test_what_wants_only_what_is_known_ends_with_a_reason() -> None:
    result = search(Known(SPACE), FunctionProblem(SPACE, sum), budget=Budget(evaluations=9))
    assert len(result.outcomes) == 1
    assert "no assignment that is new" in result.stop_reason


class Failing(OneFidelity):
    """Measures all neighbours of uniform and keeps what it heard."""

    def steps(self) -> Steps[None]:
        wanted = list(self.space.switches(self.space.uniform()))
        self.heard = dict(zip(wanted, (yield from self.measure(wanted))[0], strict=True))


def test_a_failed_trial_is_told_as_an_infinite_loss() -> None:
    problem, searcher = TokenProblem(SPACE, fails="some"), Failing(SPACE, batch=4)
    outcomes = search(searcher, problem, budget=Budget(evaluations=200)).outcomes
    failed = {o.trial.levels for o in outcomes if o.status == "failed"}
    assert failed
    assert failed == {levels for levels, loss in searcher.heard.items() if math.isinf(loss)}
    assert set(searcher.heard) == {o.trial.levels for o in outcomes}
