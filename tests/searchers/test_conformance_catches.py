"""The conformance suite fails what it should: a third party's searcher, and ways to break it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from evo_hpo import Allowance, Assignment, Batch, CompressionSpace, Outcome, Searcher
from evo_hpo.errors import InfeasibleError
from evo_hpo.search.conformance import SearcherConformance


class Sound(Searcher):
    """Random draws, kept within the allowance."""

    def ask(self, allowance: Allowance) -> Batch:
        return self.propose(self.space.sample(self.rng) for _ in range(max(1, allowance.affords(4))))

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        self.remember(outcomes)


class Overdrawn(Sound):
    def ask(self, allowance: Allowance) -> Batch:
        return super().ask(Allowance())


class Unfeasible(Sound):
    def ask(self, allowance: Allowance) -> Batch:
        return self.propose([tuple(len(u.costs) - 1 for u in self.space.units)])


class Unseeded(Sound):
    def ask(self, allowance: Allowance) -> Batch:
        self.rng.bit_generator.advance(random.randrange(10**6))  # type: ignore[attr-defined]
        return super().ask(allowance)


class Indifferent(Sound):
    def __init__(self, space: CompressionSpace, *, seed: int = 0) -> None:
        super().__init__(space, seed=0)


class Gullible(Sound):
    """Takes whatever came last, failed or not."""

    last: Assignment | None = None

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        failed = [o for o in outcomes if not o.usable]
        self.last = failed[-1].trial.levels if failed else self.last

    def recommend(self) -> Assignment | None:
        return self.last


class Suite(SearcherConformance):
    def searcher(self, name: str, space: CompressionSpace, seed: int) -> Searcher:
        made: Searcher = globals()[name](space, seed=seed)
        return made


class TestSound(Suite):
    names = ("Sound",)


def test_asking_for_too_much_is_caught() -> None:
    with pytest.raises(AssertionError):
        Suite().test_keeps_to_its_allowance("Overdrawn")


def test_infeasible_assignments_are_caught() -> None:
    with pytest.raises(InfeasibleError):
        Suite().test_asks_only_feasible_assignments_and_ends("Unfeasible", "equal")


def test_other_randomness_than_the_seeds_is_caught() -> None:
    with pytest.raises(AssertionError):
        Suite().test_same_seed_same_trials_also_in_a_spawned_process("Unseeded")


def test_a_seed_that_changes_nothing_is_caught() -> None:
    with pytest.raises(AssertionError):
        Suite().test_different_seeds_differ("Indifferent")


def test_recommending_a_failed_trial_is_caught() -> None:
    with pytest.raises(AssertionError):
        Suite().test_survives_failed_trials("Gullible")
