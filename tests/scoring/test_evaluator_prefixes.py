"""The order of candidates: every needed state is there, and no block runs twice on the same input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evo_hpo.scoring.early_stopping import complete_best
from evo_hpo.scoring.prefixes import Signature, plan_visits, shared_prefix

SIGNATURES = st.integers(2, 6).flatmap(
    lambda blocks: st.lists(
        st.lists(st.tuples(st.integers(0, 2)), min_size=blocks, max_size=blocks).map(tuple),
        min_size=1,
        max_size=12,
        unique=True,
    )
)


def _simulate(signatures: list[Signature], most_states: int | None) -> int:
    """Runs the plan on symbolic states (the prefix itself); returns the number of block passes."""
    states: dict[int, Signature] = {}
    passes = 0
    seen = []
    for visit in plan_visits(signatures, most_states):
        own = signatures[visit.index]
        if visit.start:
            assert states[visit.start] == own[: visit.start]
        states = {d: s for d, s in states.items() if d <= visit.start} | {d: own[:d] for d in visit.keep}
        assert most_states is None or len(states) <= most_states
        passes += len(own) - visit.start
        seen.append(visit.index)
    assert sorted(seen) == list(range(len(signatures)))
    return passes


@settings(max_examples=200, deadline=None)
@given(SIGNATURES)
def test_each_distinct_prefix_is_run_once(signatures: list[Signature]) -> None:
    nodes = {s[:d] for s in signatures for d in range(1, len(s) + 1)}
    assert _simulate(signatures, None) == len(nodes)


@settings(max_examples=100, deadline=None)
@given(SIGNATURES, st.integers(0, 3))
def test_a_limit_on_states_is_kept(signatures: list[Signature], most: int) -> None:
    passes = _simulate(signatures, most)
    assert passes <= len(signatures) * len(signatures[0])
    if most == 0:
        assert passes == len(signatures) * len(signatures[0])


def test_shared_prefix_counts_leading_blocks() -> None:
    assert shared_prefix(((1,), (2,), (3,)), ((1,), (2,), (0,))) == 2
    assert shared_prefix(((1,),), ((1,),)) == 1


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 10),
    st.integers(2, 6),
    st.integers(1, 4),
)
def test_stopping_completes_the_best(seed: int, candidates: int, batches: int, keep: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.exponential(size=(candidates, 1)) * rng.uniform(0, 2, size=(candidates, batches))
    keep = min(keep, candidates)
    sums = np.full_like(truth, np.nan)

    def run(chosen: list[int], numbers: list[int]) -> None:
        for i in chosen:
            sums[i, list(numbers)] = truth[i, list(numbers)]

    complete_best(run, sums, [slice(i, i + 1) for i in range(batches)], keep)  # type: ignore[arg-type]
    everything = sorted(truth.sum(axis=1))
    complete = sorted(sums[~np.isnan(sums).any(axis=1)].sum(axis=1))
    np.testing.assert_allclose(complete[:keep], everything[:keep])
    stopped = np.isnan(sums).any(axis=1)
    assert all(np.nansum(row) > everything[keep - 1] for row in sums[stopped])


def test_stopping_saves_reading_when_candidates_differ_widely() -> None:
    truth = np.array([[1.0] * 8, [3.0] * 8, [10.0] * 8])
    sums = np.full_like(truth, np.nan)

    def run(chosen: list[int], numbers: list[int]) -> None:
        for i in chosen:
            sums[i, list(numbers)] = truth[i, list(numbers)]

    complete_best(run, sums, [slice(i, i + 1) for i in range(8)], 1)  # type: ignore[arg-type]
    assert [int((~np.isnan(row)).sum()) for row in sums] == [8, 3, 1]
    assert np.nansum(sums[1]) == pytest.approx(9.0)
