"""The measurement of all searchers: every entry of the line-up runs, and its tables say what the rows hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.measurements.searchers.generations import generations
from benchmarks.measurements.searchers.lineup import LINEUP, SUITES, Suite
from benchmarks.measurements.searchers.measure import measure
from benchmarks.measurements.searchers.overhead import overhead
from benchmarks.measurements.searchers.table import encodings, gaps, hits, kinds, overview, significance, table
from searchers.foreign.nevergrad_adapter import family


@pytest.mark.parametrize("label", [label for label in LINEUP if not label.startswith(("optuna", "never"))])
def test_every_entry_of_the_line_up_runs(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "hits", replace(SUITES["hits"], evaluations=30))
    row = measure("8008, 0.1", label, 0, "hits")
    assert row["evaluations"] <= 30
    assert row["optimum"] - 1e-9 <= row["loss"]


def row(searcher: str, seed: int, loss: float, optimum: float | None) -> dict[str, Any]:
    return {"problem": "p", "searcher": searcher, "seed": seed, "loss": loss, "uniform": 10.0, "optimum": optimum}


def test_gaps_are_percent_of_the_way_from_the_best_known_to_uniform() -> None:
    known = [row("a", 0, 5.0, 5.0), row("b", 0, 7.5, 5.0), row("a", 1, 10.0, 5.0)]
    assert gaps(known) == {("p", "a"): [0.0, 100.0], ("p", "b"): [50.0]}
    assert "| a | 1.5 | 1/2, 50.0" in table(known) or "| a | 1.0 | 1/2, 50.0" in table(known)
    unknown = [row("a", 0, 6.0, None), row("b", 0, 8.0, None)]
    assert gaps(unknown) == {("p", "a"): [0.0], ("p", "b"): [50.0]}
    assert "/" not in table(unknown).splitlines()[2]


def test_hits_are_counted_and_gaps_averaged() -> None:
    found = [row("a", 0, 5.0, 5.0), row("a", 1, 7.0, 5.0), row("b", 0, 10.0, 5.0), row("b", 1, 10.0, None)]
    assert hits(found).splitlines()[2:] == ["| a | 1 of 2, 20.0 |", "| b | 0 of 1, 100.0 |"]


def test_an_overview_ranks_what_was_measured_everywhere() -> None:
    def at(problem: str, searcher: str, loss: float) -> dict[str, Any]:
        return row(searcher, 0, loss, 5.0) | {"problem": problem}

    rows = [at("additive 30", "a", 6.0), at("additive 60", "a", 8.0), at("noisy 30", "a", 5.0)]
    rows += [
        at("additive 30", "b", 5.5),
        at("additive 60", "b", 9.0),
        at("noisy 30", "b", 6.0),
        at("noisy 30", "c", 5.0),
    ]
    assert overview(rows).splitlines() == [
        "| searcher | seeds | mean rank | 30 units | 60 units | additive | noisy |",
        "|---|---|---|---|---|---|---|",
        "| a | 1 | 1.3 | 10.0 | 60.0 | 40.0 | 0.0 |",
        "| b | 1 | 1.7 | 15.0 | 80.0 | 45.0 | 20.0 |",
        "| c | 1 |  |  |  |  | 0.0 |",
    ]


def test_encodings_are_compared_on_the_problems_that_all_of_them_were_measured_on() -> None:
    rows = [row("a / keys", 0, 6.0, 5.0), row("a / native", 0, 5.5, 5.0)]
    rows.append(row("a / keys", 0, 5.0, 5.0) | {"problem": "keys alone"})
    assert encodings(rows).splitlines()[2] == "| `a` | 20.0 | **10.0** | 1 |"


def test_slow_searchers_get_fewer_seeds_where_a_suite_says_so() -> None:
    suite = Suite({}, {}, 200, 10, (("slow / best", 10), ("slow", 3)))
    assert suite.seeds_of("quick") == 10
    assert suite.seeds_of("slow / best") == 10
    assert suite.seeds_of("slow / other") == 3


def test_every_optimizer_of_nevergrad_that_works_is_in_the_line_up_under_every_encoding() -> None:
    searchers = SUITES["nevergrad"].searchers
    assert searchers["nevergrad:DE / keys"] == ("nevergrad:DE", {"encoding": "keys"})
    left = {f"nevergrad:{name}" for name in family.members()} - {name for name, _ in searchers.values()}
    assert left == {"nevergrad:BO", "nevergrad:BOSplit"}
    assert len(searchers) == 5 * (len(family.members()) - 2)


def test_overhead_is_timed_for_the_trials_that_were_made() -> None:
    seconds, trials, cut = overhead("evopress", 30, 20)
    assert trials == 20
    assert 0 < seconds < 1
    assert not cut


def test_a_search_that_takes_longer_than_the_limit_is_cut_off_and_timed_over_what_it_made() -> None:
    seconds, trials, cut = overhead("evopress", 30, 10**6, limit=0.05)
    assert cut
    assert 0.05 < seconds < 5
    assert 0 < trials < 10**6


@pytest.mark.parametrize("offspring", [1, 8])
def test_evopress_needs_about_k_times_the_rest_over_lambda_generations_on_linear_losses(offspring: int) -> None:
    mean = sum(generations(30, 10, offspring, seed) for seed in range(6)) / 6
    assert 0.5 < mean / (10 * 20 / offspring) < 6


def test_a_searcher_no_better_than_uniform_has_a_gap_of_nothing_where_nothing_better_is_known() -> None:
    assert gaps([row("uniform", 0, 10.0, None)])["p", "uniform"] == [0.0]


def test_encodings_are_compared_on_the_seeds_that_all_of_them_have() -> None:
    rows = [row("a / keys", 0, 6.0, 5.0), row("a / native", 0, 5.5, 5.0), row("a / native", 1, 9.0, 5.0)]
    assert encodings(rows).splitlines()[2] == "| `a` | 20.0 | **10.0** | 1 |"


def encoded(optimizer: str, losses: dict[str, float]) -> list[dict[str, Any]]:
    return [row(f"{optimizer} / {e}", seed, x + 0.01 * seed, 5.0) for e, x in losses.items() for seed in range(6)]


def test_kinds_average_over_the_optimizers_whose_names_share_a_part() -> None:
    rows = encoded("nevergrad:DE", {"keys": 6.0, "native": 8.0}) + encoded(
        "nevergrad:TwoPointsDE", {"keys": 7.0, "native": 6.0}
    )
    line = kinds(rows).splitlines()[2]
    assert [cell.strip(" *") for cell in line.strip("| ").split("|")] == ["DE", "2", "30.5", "40.5", "`keys`", "1 of 2"]


def test_searchers_are_tested_against_the_best_encoding_or_any_other() -> None:
    """Six pairs of one sign have a probability of 2 / 2^6 under both tests."""
    rows = encoded("optuna:a", {"keys": 6.0, "native": 8.0}) + [row("b", s, 9.0, 5.0) for s in range(6)]
    line = significance(rows).splitlines()[2:]
    assert line == ["| optuna:a / native | optuna:a / keys | 6 | 0 | 6 | 0.031 | 0.031 |"]
    line = significance(rows, ("optuna",), "b").splitlines()[2:]
    assert line[0] == "| optuna:a / keys | b | 6 | 6 | 0 | 0.031 | 0.031 |"
