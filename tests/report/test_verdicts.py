"""What may be said of pairs: single runs, failures, unequal seeds, problems and searches that are missing."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from evo_hpo.errors import UnknownNameError
from evo_hpo.record.problem_record import ProblemRecord
from evo_hpo.report.findings import Findings
from evo_hpo.report.gaps import as_gaps
from evo_hpo.report.page import _facts, medians_sheet, problem_sheets
from evo_hpo.report.statistics import compare_pairs, spread
from evo_hpo.report.summary import summarise
from evo_hpo.report.tables import interval_note, interval_text, percent_text, rows, seeds_text, wins_text
from tests.report.synthetic import in_memory, of_runs, one_run


def seeds(label: str, losses: list[float], problem: str = "p") -> list[object]:
    return [one_run(problem, label, seed, [loss]) for seed, loss in enumerate(losses)]


def uniform(loss: float = 1.0, problem: str = "p") -> object:
    return one_run(problem, "uniform", 0, [loss], fixed=True)


def made(*runs: object, **more: object) -> Findings:
    flat = [r for found in runs for r in (found if isinstance(found, list) else [found])]
    return of_runs(flat, **more)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- one run each


def test_two_searchers_without_chance_are_one_pair_whatever_the_seeds_of_others() -> None:
    random = [0.95 + 0.01 * s for s in range(8)]
    found = made(uniform(), one_run("p", "brute_force", 0, [0.9], fixed=True), seeds("random", random)).summary()
    tests = {s.label: s.versus_uniform for s in found.standings if s.versus_uniform}
    assert (tests["brute_force"].pairs, tests["brute_force"].wins, tests["brute_force"].p) == (1, 1, 1.0)
    assert tests["brute_force"].claim.startswith("one run each, too few for a claim (1 pair cannot")
    assert tests["random"].pairs == 8
    assert tests["random"].p == pytest.approx(stats.wilcoxon(np.array(random) - 1).pvalue)
    assert found.best == "brute_force"
    assert "is below uniform (one run each)" in found.verdict
    assert "nothing to test against uniform" in found.verdict


def test_where_nothing_is_left_to_chance_there_is_nothing_to_test() -> None:
    fixed = [one_run("p", name, 0, [loss], fixed=True) for name, loss in (("a", 0.5), ("b", 0.6), ("uniform", 1.0))]
    found = of_runs(fixed).summary()
    assert found.pairs == 1
    assert "nothing to test" in found.verdict
    over_two = of_runs([*fixed, *(replace(r, problem="q", id=f"q{r.id}") for r in fixed)]).summary()
    assert over_two.pairs == 2


def test_a_problem_is_one_pair_of_two_searchers_without_chance() -> None:
    per_problem = [(0.5, 1.0), (0.4, 2.0), (3.0, 1.0)]
    runs = []
    for key, (loss, base) in zip("pqr", per_problem, strict=True):
        runs += [one_run(key, "a", 0, [loss], fixed=True), one_run(key, "uniform", 0, [base], fixed=True)]
        runs += [one_run(key, "random", s, [0.9]) for s in range(4)]
    test = next(s.versus_uniform for s in of_runs(runs).summary().standings if s.label == "a")
    assert test is not None
    assert (test.pairs, test.wins, test.losses) == (3, 2, 1)


# ---------------------------------------------------------------------- instances


def test_each_seed_is_held_against_uniform_on_its_own_instance() -> None:
    """Uniform is the best known of the first instance: its gap there is 0, and 100 on the others."""
    searchers = {"uniform": [1.0] * 4, "a": [1.2, 0.5, 0.5, 0.5]}
    runs = [one_run("p", label, seed, [x]) for label, losses in searchers.items() for seed, x in enumerate(losses)]
    base = of_runs(runs, instances={str(s): {"optimum": None} for s in range(4)})
    problems, shown, _ = as_gaps(base.problems, base.runs)
    found = Findings("made", problems, tuple(shown))
    row = next(r for r in rows(found, "p") if r.searcher == "a")
    assert wins_text(row) == "3/4"
    assert percent_text(row.gain) == "+100.0 %"
    test = next(s.versus_uniform for s in found.summary().standings if s.label == "a")
    assert test is not None
    assert (test.wins, test.losses) == (3, 1)
    assert found.scale("p") == (0.0, 100.0)
    assert found.pairs(value="gap")["a"].tolist() == found.pairs()["a"].tolist()
    (axes,) = found.anytime().axes
    black = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines() if line.get_color() == "black"]
    assert {float(y[0]) for y in black if len(y)} == {100.0}


# ---------------------------------------------------------------------- failures


def test_a_loss_that_is_not_finite_scales_no_gap() -> None:
    first = [one_run("p", "a", s, [math.nan, 0.5 + 0.1 * s]) for s in range(3)]
    found = made(first, [one_run("p", "b", s, [math.inf, 0.9]) for s in range(3)], uniform())
    assert found.scale("p") == (0.5, 0.5)
    assert found.pairs(value="gap")["a"].tolist() == pytest.approx([0, 20, 40])
    assert made(first, uniform(math.inf)).scale("p")[1] == pytest.approx(0.2)


def test_uniform_that_failed_is_nothing_to_be_held_against() -> None:
    found = made(seeds("a", [0.5, 0.6, 0.7]), seeds("b", [5.0, 6.0, 7.0]), uniform(math.nan))
    summary = found.summary()
    assert found.uniform("p") is None
    assert not [s for s in summary.standings if s.versus_uniform]
    assert "below uniform" not in summary.verdict
    assert "inf" not in summary.verdict
    assert {r.searcher: r.compared for r in rows(found, "p")} == {"a": 0, "b": 0, "uniform": 0}
    other = [replace(r, problem="q", id=f"q{r.id}") for r in made(seeds("a", [0.5]), uniform()).runs]
    both = summarise(of_runs([*found.runs, *other]))
    test = next(s.versus_uniform for s in both.standings if s.label == "a")
    assert test is not None
    assert test.pairs == 1


def test_nobody_wins_where_every_median_failed() -> None:
    assert "no searcher has a finite median" in made(seeds("a", [math.inf, 1.0]), uniform(math.nan)).summary().verdict


def test_failures_both_ways_have_no_median_difference_and_no_warning() -> None:
    inf = math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (test,) = compare_pairs({"a": np.array([inf, 1, inf, 1]), "b": np.array([1, inf, 1, inf])}, [("a", "b")])
    assert (test.wins, test.losses) == (2, 2)
    assert math.isnan(test.difference.estimate)
    assert interval_text(test.difference) == "–"


def test_a_failed_seed_of_many_is_not_called_too_few() -> None:
    found = rows(made(seeds("a", [math.nan, *[0.5 + 0.1 * s for s in range(7)]]), uniform()), "p")
    assert interval_note(found) == "Median; in brackets: least and greatest where a search failed."


# ---------------------------------------------------------------------- several problems


def test_medians_over_several_problems_are_of_those_that_every_searcher_finished() -> None:
    """On p b is better; a has finished nothing on q, where gaps are large."""
    runs = [uniform(), uniform(problem="q")]
    for s in range(3):
        runs += [one_run("p", "a", s, [0.5]), one_run("p", "b", s, [0.4]), one_run("q", "b", s, [0.99 - 0.01 * s])]
        runs += [one_run("q", "c", s, [0.0]), one_run("p", "c", s, [0.3]), one_run("q", "a", s, [0.9], finished=False)]
    summary = made(*runs).summary()
    gaps = made(*runs).pairs(value="gap").loc["p"]
    assert all(s.median.estimate == pytest.approx(gaps[s.label].median()) for s in summary.standings)
    assert [s.label for s in summary.standings] == ["c", "b", "a", "uniform"]
    assert summary.verdict.endswith("(on q: a).")
    alone = made(*[r for r in runs if not (r.problem == "q" and r.label != "c")], one_run("q", "d", 0, [0.1]))  # type: ignore[attr-defined]
    assert "Medians are over different problems" in alone.summary().verdict


def test_over_several_problems_it_is_pairs_that_are_too_few() -> None:
    runs = [uniform(), uniform(problem="q")]
    runs += [
        one_run(key, label, s, [x + 0.1 * s]) for key in "pq" for s in (0, 1) for label, x in (("a", 0.5), ("b", 0.7))
    ]
    assert "4 (problem, seed) pairs are too few" in made(*runs).summary().verdict
    assert "2 seeds are too few" in made(*runs).summary("p").verdict


def test_intervals_over_several_problems_resample_seeds_inside_their_problem() -> None:
    """Five seeds at gap 10 on p and six at 90 on q: the median of all is one of the two, whatever is drawn inside."""
    runs = [uniform(100.0), uniform(100.0, "q"), one_run("p", "zero", 0, [0.0], fixed=True)]
    runs += [one_run("q", "zero", 0, [0.0], fixed=True)]
    runs += [one_run("p", "a", s, [10.0]) for s in range(5)] + [one_run("q", "a", s, [90.0]) for s in range(6)]
    standing = next(s for s in made(*runs).summary().standings if s.label == "a")
    assert (standing.median.estimate, standing.median.low, standing.median.high) == (90, 90, 90)
    assert spread([10.0] * 5 + [90.0] * 6).low == 10


def test_the_least_of_each_column_is_marked_in_the_table_of_medians() -> None:
    found = made(uniform(), uniform(problem="q"), seeds("a", [0.5]), seeds("a", [2.0], "q"))
    sheet = medians_sheet(found, {k: found.summary(k) for k in "pq"}, ["a", "uniform"])
    assert sheet.rows == (("a", "0.5000 *", "2.000"), ("uniform", "1.000", "1.000 *"))


# ---------------------------------------------------------------------- what is missing


def test_searches_that_are_missing_count_on_their_own_problem() -> None:
    runs = [uniform(), uniform(problem="q"), *seeds("a", [0.5, 0.6]), *seeds("a", [0.5, 0.6], "q")]
    found = made(*runs, missing=[("p", "a", 2), ("p", "a", 3), ("p", "c", 0)])
    assert found.summary("p").verdict.startswith("So far (3 of 6 searches finished): ")
    assert found.summary("q").verdict.startswith("a has the least")
    assert found.summary().verdict.startswith("So far (6 of 9 searches finished): ")
    assert {r.searcher: seeds_text(r) for r in rows(found, "p")} == {"a": "2 of 4 (50%)", "uniform": "1"}
    assert {r.searcher: seeds_text(r) for r in rows(found, "q")} == {"a": "2", "uniform": "1"}


def test_the_only_problem_with_results_does_not_speak_for_one_that_has_none() -> None:
    found = made(uniform(), seeds("a", [0.5]), missing=[("q", "a", 0), ("q", "uniform", 0)])
    assert summarise(found, ["p"]).verdict.startswith("So far (2 of 4 searches finished): ")


# ---------------------------------------------------------------------- words


def test_the_verdict_says_where_the_test_finds_the_best_median_worse() -> None:
    """b is below a by a little in most pairs, and above it by much in the middle one: medians say otherwise."""
    a = np.arange(1.0, 14)
    b = a - 0.1 - 0.001 * a
    b[5] = 7.5
    summary = made(seeds("a", list(a)), seeds("b", list(b))).summary()
    assert stats.wilcoxon(a - b).pvalue < 0.05
    assert summary.best == "a"
    assert "Worse than b by the signed-rank test" in summary.verdict
    assert "no difference" not in summary.verdict


def test_rivals_with_too_few_common_seeds_are_named_as_that() -> None:
    better = made(seeds("a", [0.1] * 9), seeds("b", [0.5 + 0.1 * s for s in range(9)]), seeds("c", [0.6, 0.7]))
    said = better.summary().verdict
    assert "Better than b (" in said
    assert "too few common seeds with c for a claim" in said


def test_a_claim_goes_with_the_p_that_is_shown_where_pairs_are_unequal() -> None:
    """Six pairs, p = 2 / 2^6; beside a smaller p Holm's correction multiplies it by one."""
    columns = {"best": np.zeros(10), "six": np.array([*range(1, 7), *[math.nan] * 4]), "ten": np.arange(1.0, 11)}
    six, ten = compare_pairs(columns, [("best", "six"), ("best", "ten")])
    by_hand = [2 / 2**6, 2 / 2**10]
    assert (six.p, ten.p) == pytest.approx(by_hand)
    assert [six.p_holm, ten.p_holm] == pytest.approx([0.03125, 2 * 2 / 2**10])
    assert six.attainable == pytest.approx(0.03125)
    assert (six.claim, ten.claim) == ("better", "better")
    equal = compare_pairs({k: v[:6] for k, v in columns.items()}, [("best", "six"), ("best", "ten")])
    assert [t.attainable for t in equal] == pytest.approx([2 * 2 / 2**6] * 2)


def test_budgets_keep_their_digits() -> None:
    found = in_memory({"a": [1.0]})
    runs = tuple(replace(r, budget={"tokens": 1048576, "seconds": 0.5}) for r in found.runs)
    assert _facts(replace(found, runs=runs))["budget of each search"] == "0.5 seconds / 1,048,576 tokens"


# ---------------------------------------------------------------------- texts


def test_texts_and_problems_that_are_not_there_are_refused() -> None:
    found = made(uniform(), texts=("docs", "prose"))
    for problem, text, says in (("p", "typo", "docs, prose"), ("typo", "docs", "it has: p")):
        with pytest.raises(UnknownNameError, match=says):
            found.on(problem, text)


def test_the_optimum_of_the_first_text_is_not_that_of_another_and_a_dense_model_may_know_one_text_alone() -> None:
    figures = {"loss": 0.5, "b/loss": 1.5, "b/gap": 1.0}
    (run,) = made(seeds("a", [0.5])).runs
    run = replace(run, checkpoints=(replace(run.checkpoints[0], held_out=figures),))
    info = ProblemRecord(
        "p", made(uniform()).problems["p"].space, reference={"loss": 0.1}, optimum=0.4, texts=("a", "b")
    )
    found = Findings("made", {"p": info}, (run,))
    assert found.on("p", "a").problems["p"].optimum == 0.4
    assert found.on("p", "b").problems["p"].optimum is None
    beside = problem_sheets(found, "p")[1]
    assert [row[0] for row in beside.rows] == ["dense", "a"]
    assert beside.rows[0][beside.headers.index("loss on b\u00a0↓")] == "–"
