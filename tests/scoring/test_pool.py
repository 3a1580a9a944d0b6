"""Replicas side by side: order, failures and interruptions, one core each."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest
import torch

from evo_hpo.scoring.pool import ReplicaPool, one_core
from tests.scoring.evaluators import Parts, make_evaluator


@pytest.fixture
def pool(llama: Parts) -> ReplicaPool:
    return make_evaluator(llama, threads=2).pool


def test_results_come_in_order_each_from_one_core(pool: ReplicaPool) -> None:
    def work(number: int) -> tuple[int, int]:
        time.sleep(0.01 * (3 - number))
        return number, torch.get_num_threads()

    before = torch.get_num_threads()
    assert pool.run([lambda n=n: work(n) for n in range(4)]) == [(n, 1) for n in range(4)]  # type: ignore[misc]
    assert pool.run([]) == []
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_runs_any_more_when_a_failure_is_told(pool: ReplicaPool, error: type[BaseException]) -> None:
    begun, ended = threading.Barrier(2), list[str]()

    def failing() -> None:
        begun.wait(30)
        raise error

    def slow() -> None:
        begun.wait(30)
        time.sleep(0.2)
        ended.append("slow")

    def later() -> None:
        time.sleep(0.2)
        ended.append("later")

    with pytest.raises(error):
        pool.run([failing, slow, later, later, later])
    count = len(ended)
    assert "slow" in ended
    assert count < 4  # what had not begun never does
    time.sleep(0.3)
    assert len(ended) == count
    assert pool.run([lambda: 1, lambda: 2]) == [1, 2]


def test_an_error_holds_nothing_once_it_was_told(pool: ReplicaPool) -> None:
    """Memory that ran out has to be free at once, not when cycles of references are looked for."""

    class Large: ...

    def failing() -> None:
        large = Large()
        raise MemoryError(id(large))

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(MemoryError) as caught:
            pool.run([failing, failing])
        del caught
        assert not [each for each in gc.get_objects() if type(each) is Large]
    finally:
        gc.enable()


def test_one_core_is_given_back_after_an_error() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)

    def work() -> Any:
        with one_core():
            assert torch.get_num_threads() == 1
            raise ValueError("fails")

    try:
        with pytest.raises(ValueError, match="fails"):
            work()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
