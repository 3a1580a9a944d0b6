"""Folders as searches leave them, whole, torn and partial."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evo_hpo.errors import PlanError, UnknownNameError
from evo_hpo.record.comparison import disambiguate
from evo_hpo.report import Findings
from evo_hpo.report.lineage import lineage
from evo_hpo.report.page import standing_sheets
from evo_hpo.report.summary import summarise
from evo_hpo.report.tables import rows, table_frame
from evo_hpo.search.trial import Outcome, Trial
from tests.report.synthetic import StandIn, in_memory, model_space


def test_figures_are_those_of_the_journals(demo: Path) -> None:
    comparison = Findings.load(demo)
    problem = StandIn(model_space(4))
    assert comparison.complete
    assert comparison.labels == ("uniform", "random", "evopress")
    for run in comparison.runs:
        assert run.final is not None
        assert run.loss == pytest.approx(problem.exact(run.final.levels))
        assert run.tokens == sum(o.tokens for o in run.outcomes) <= 64 * 60
    frame = comparison.frame()
    assert len(frame) == 5
    assert len(comparison.trials()) == frame["trials"].sum()
    assert comparison.checkpoints()["loss"].notna().all()


def test_uniform_stands_for_every_seed(demo: Path) -> None:
    comparison = Findings.load(demo)
    pairs = comparison.pairs()
    assert list(pairs.index) == [("stand-in", 0), ("stand-in", 1)]
    assert pairs["uniform"].nunique() == 1
    assert not pairs.isna().to_numpy().any()


def test_rows_hold_medians_gains_and_the_dense_model(demo: Path) -> None:
    comparison = Findings.load(demo)
    found = {r.searcher: r for r in rows(comparison, "stand-in")}
    pairs = comparison.pairs()
    assert found["dense"].perplexity.estimate == 20.0
    gains = 100 * (1 - pairs["evopress"] / pairs["uniform"])
    assert found["evopress"].gain.estimate == pytest.approx(gains.median())
    assert found["evopress"].wins == (pairs["evopress"] < pairs["uniform"]).sum()
    assert found["evopress"].loss.low == pairs["evopress"].min()
    assert found["evopress"].average.estimate <= 3.0
    assert found["uniform"].compared == 0
    assert table_frame(comparison)["loss"].notna().all()


def test_gap_is_zero_at_the_optimum_and_a_hundred_at_uniform(suite: Path) -> None:
    comparison = Findings.load(suite)
    gaps = comparison.pairs(value="gap").loc[["additive"]]
    assert np.allclose(gaps["uniform"], 100)
    assert (gaps >= -1e-9).all(axis=None)
    loss, info = comparison.pairs().loc[["additive"]], comparison.problems["additive"]
    assert info.optimum is not None
    uniform = loss["uniform"].iloc[0]
    by_hand = 100 * (loss["random"] - info.optimum) / (uniform - info.optimum)
    assert np.allclose(gaps["random"], by_hand)


def test_variants_of_one_searcher_are_told_apart(suite: Path) -> None:
    labels = Findings.load(suite).labels
    assert labels == ("uniform", "random", "evopress (offspring=4)", "evopress (offspring=16)")
    assert disambiguate([{"searcher": "a"}, {"searcher": "a", "settings": {"k": 1}}]) == [
        "a (default settings)",
        "a (k=1)",
    ]


def test_a_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"comparison\.json"):
        Findings.load(tmp_path)


def test_an_unknown_problem_is_refused(demo: Path) -> None:
    with pytest.raises(UnknownNameError, match="stand-in"):
        Findings.load(demo).problem("other")


def partial(folder: Path, target: Path) -> Path:
    """The folder as it was in the middle: one journal missing, one torn, one without its end, one damaged."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("report"))
    journals = sorted((target / "journals").glob("*.jsonl"))
    by_name = {j.stem.removeprefix("stand-in-"): j for j in journals}
    by_name["random-s1"].unlink()
    lines = by_name["evopress-s1"].read_bytes().splitlines(keepends=True)
    by_name["evopress-s1"].write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:7])
    damaged = by_name["random-s0"].read_bytes().splitlines(keepends=True)
    damaged[3] = b'{"kind": broken}\n'
    by_name["random-s0"].write_bytes(b"".join(damaged))
    return target


def test_partial_results_can_be_read(demo: Path, tmp_path: Path) -> None:
    comparison = Findings.load(partial(demo, tmp_path / "part"))
    assert not comparison.complete
    assert comparison.missing["stand-in-random-s1"] == "not started"
    assert "damaged" in comparison.missing["stand-in-random-s0"] or comparison.missing["stand-in-random-s0"]
    unfinished = next(r for r in comparison.runs if r.id == "stand-in-evopress-s1")
    assert not unfinished.finished
    assert 0.2 < unfinished.progress < 0.8
    assert comparison.pairs().isna().loc[("stand-in", 1), "evopress"]
    assert summarise(comparison).verdict.startswith("So far (2 of 5 searches finished)")


def test_nothing_started_yet(demo: Path, tmp_path: Path) -> None:
    target = tmp_path / "empty"
    target.mkdir()
    data = json.loads((demo / "comparison.json").read_text())
    (target / "comparison.json").write_text(json.dumps(data | {"problems": {}}))
    comparison = Findings.load(target)
    assert not comparison.runs
    assert len(comparison.missing) == 5
    assert comparison.frame().empty


def test_lineage_goes_from_the_start_to_the_winner(demo: Path) -> None:
    comparison = Findings.load(demo)
    run = next(r for r in comparison.runs if r.label == "evopress")
    space = comparison.problems["stand-in"].space
    steps = lineage(run, space)
    assert len(steps) > 2
    assert run.final is not None
    assert steps[-1].levels == run.final.levels
    levels = dict(space.labels(steps[0].levels))
    for step in steps[1:]:
        for name, old, new in step.changes:
            assert levels[name] == old
            levels[name] = new
    assert levels == space.labels(run.final.levels)
    assert [s.tokens for s in steps] == sorted(s.tokens for s in steps)


def test_the_verdict_says_who_wins_and_how_sure_that_is() -> None:
    few = summarise(in_memory({"uniform": [1.0], "good": [0.5, 0.6], "bad": [1.5, 1.4]}))
    assert few.best == "good"
    assert "45.0 % below uniform" in few.verdict
    assert "2 of 2 seeds" in few.verdict
    assert "too few for a claim" in few.verdict
    assert "7 seeds or more" in few.verdict
    rng = np.random.default_rng(0)
    many = {"good": 0.5 + 0.1 * rng.random(10), "close": 0.5 + 0.1 * rng.random(10), "bad": 1 + rng.random(10)}
    sure = summarise(in_memory({"uniform": [1.0], **{k: v.tolist() for k, v in many.items()}}))
    assert "Better than uniform and bad" in sure.verdict
    assert "no difference shown to" in sure.verdict
    none = summarise(in_memory({"uniform": [0.1], "bad": [1.0] * 10}))
    assert "no searcher beat uniform" in none.verdict


def test_summary_agrees_with_the_table_of_pairs(suite: Path) -> None:
    comparison = Findings.load(suite)
    summary = summarise(comparison)
    gaps = comparison.pairs(value="gap")
    assert summary.pairs == len(gaps) == 12
    for standing in summary.standings:
        assert standing.median.estimate == pytest.approx(gaps[standing.label].median())
        assert standing.rank == pytest.approx(gaps.rank(axis=1)[standing.label].mean())
    single = summarise(comparison, ["additive"])
    assert single.standings[0].running_times[0.0] < float("inf")
    assert len(single.frame()) == len(single.standings)


def test_nothing_is_said_of_the_way_where_a_single_checkpoint_tells_of_it(suite: Path) -> None:
    """Its curve is a step at the end: mean loss would be uniform's for all, and nobody sooner than another."""
    told, (alone, *_) = Findings.load(suite), in_memory({"uniform": [1.0], "good": [0.5]}).problems
    assert [s.title for s in standing_sheets(summarise(told, ["additive"]))][-1] == "Over the whole budget"
    single = summarise(in_memory({"uniform": [1.0], "good": [0.5]}), [alone])
    assert [sheet.title for sheet in standing_sheets(single)] == ["How sure is that?", "Against uniform compression"]
    assert all(s.area is None and not s.running_times for s in single.standings)


def test_a_parent_that_was_scored_again_counts_once() -> None:
    base = in_memory({"a": [1.0]})
    space = base.problems["made"].space
    final = (0, 0, 1, 1)
    chain = [((1, 1, 0, 0), None), ((1, 1, 0, 0), 0), ((1, 0, 1, 0), 1), ((0, 1, 0, 1), 1), (final, 2)]
    outcomes = tuple(Outcome(Trial(i, levels, parent=parent), 1.0, 10) for i, (levels, parent) in enumerate(chain))
    steps = lineage(replace(base.runs[0], outcomes=outcomes), space)
    assert [s.trial for s in steps] == [0, 2, 4]
    assert steps[-1].changes == (("u0", "1", "0"), ("u3", "0", "1"))
    assert [s.tokens for s in steps] == [10, 30, 50]
