"""What a process has scored before saves reading, and decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evo_hpo.scoring.rounds import Group, Rounds, Sums, groups_of
from evo_hpo.space.compression_space import Assignment

TRUTH = np.random.default_rng(0).exponential(size=(12, 1)) * np.random.default_rng(1).uniform(0.5, 1.5, size=(12, 9))
Batch = tuple[list[int], int, int | None]  # numbers of assignments, sequences, how many must be complete


class Reader:
    """Scores by what is in ``TRUTH``, and counts what it had to read."""

    def __init__(self, group: int) -> None:
        self.rounds, self.group, self.count = Rounds(early_stopping=True), group, 0

    def score(self, batch: Batch, elsewhere: dict[Assignment, Sums] | None = None) -> list[Sums]:
        numbers, sequences, keep = batch
        groups = groups_of(range(sequences), self.group)
        asked = [(n,) for n in numbers]
        found, todo, keep = self.rounds.known_of(asked, 7, groups, keep, (elsewhere or {}).get)
        if todo:
            sums, count = self.rounds.read(todo, groups, keep, self._read)
            found.update(zip(todo, sums, strict=True))
            assert count <= np.isfinite(sums).sum()
            self.count += count
        return [found[a] for a in asked]

    @staticmethod
    def _read(todo: Sequence[Assignment], candidates: Sequence[int], groups: Sequence[Group], sums: Sums) -> None:
        assert candidates
        for i in candidates:
            assert any(np.isnan(sums[i, columns]).any() for _, columns in groups)  # nobody is read for nothing
            for members, columns in groups:
                sums[i, columns] = TRUTH[todo[i][0], list(members)]


batches = st.tuples(
    st.lists(st.integers(0, len(TRUTH) - 1), min_size=1, max_size=8),
    st.integers(1, TRUTH.shape[1]),
    st.none() | st.integers(1, 4),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(batches, max_size=4), batches, st.integers(1, 4), st.sets(st.integers(0, len(TRUTH) - 1)))
def test_what_was_scored_before_changes_no_score_and_no_charge(
    before: list[Batch], batch: Batch, group: int, cached: set[int]
) -> None:
    fresh, used = Reader(group), Reader(group)
    for earlier in before:
        used.score(earlier)
    expected = fresh.score(batch)
    cost = used.count
    found = used.score(batch, {(n,): TRUTH[n, : batch[1]] for n in cached})
    np.testing.assert_array_equal(found, expected)  # where some are stopped too
    assert used.count - cost <= fresh.count


def test_nothing_is_read_twice_on_minibatches_of_one_seed() -> None:
    reader = Reader(2)
    reader.score(([0, 1, 2], 4, None))
    reader.score(([0, 1, 2], 9, None))
    assert reader.count == 3 * 9
    reader.score(([0, 1, 2], 9, 1))
    reader.score(([2, 1], 6, None))
    assert reader.count == 3 * 9


class _ByPass(Reader):
    """A sequence's sum depends a little on the others of its pass, as it does in a matrix product of several."""

    @staticmethod
    def _read(todo: Sequence[Assignment], candidates: Sequence[int], groups: Sequence[Group], sums: Sums) -> None:
        for i in candidates:
            for members, columns in groups:
                sums[i, columns] = TRUTH[todo[i][0], list(members)] + 1e-9 * len(members)


@settings(max_examples=200, deadline=None)
@given(st.lists(batches, max_size=4), batches, st.integers(1, 4))
def test_a_sum_of_another_pass_is_not_taken_for_one_of_this(before: list[Batch], batch: Batch, group: int) -> None:
    fresh, used = _ByPass(group), _ByPass(group)
    for earlier in before:
        used.score(earlier)
    np.testing.assert_array_equal(used.score(batch), fresh.score(batch))


@pytest.mark.parametrize(("count", "size"), [(5, 2), (4, 4), (3, 8)])
def test_groups_end_with_the_sequences(count: int, size: int) -> None:
    groups = groups_of(range(10, 10 + count), size)
    assert [s for members, _ in groups for s in members] == [*range(10, 10 + count)]
    assert np.r_[tuple(columns for _, columns in groups)].tolist() == [*range(count)]
