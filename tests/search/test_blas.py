"""Numeric libraries while searches run in threads."""

from __future__ import annotations

import threading

from threadpoolctl import threadpool_info, threadpool_limits

from evo_hpo.search.loop import one_blas_thread


def threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_one_thread_while_any_search_runs_and_the_others_again_after_the_last() -> None:
    first_ended, seen = threading.Event(), list[set[int]]()

    def first() -> None:
        with one_blas_thread():
            pass
        first_ended.set()

    def second() -> None:
        with one_blas_thread():
            assert first_ended.wait(10)
            seen.append(threads())

    with threadpool_limits(2, "blas"):
        with one_blas_thread():  # as the process of a cluster's searches does
            searches = [threading.Thread(target=run) for run in (second, first)]
            for each in searches:
                each.start()
            for each in searches:
                each.join()
        assert seen == [{1}]
        assert threads() == {2}
