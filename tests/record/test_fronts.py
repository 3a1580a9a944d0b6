"""How fronts are judged, held against sums by hand, and how journals and folders keep them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.problems.synthetic import additive, noisy
from evo_hpo.errors import JournalError
from evo_hpo.record.comparison import Comparison, winner
from evo_hpo.record.fronts import Measure, judged, measures, picked
from evo_hpo.record.journal import Journal, search_header
from evo_hpo.record.problem_record import ProblemRecord
from evo_hpo.record.records import SearchRecord, read_journal
from evo_hpo.search.budget import Budget
from evo_hpo.search.checkpoint import FrontPoint
from evo_hpo.search.loop import search
from evo_hpo.search.problem import Problem
from evo_hpo.space.ranges import marks
from searchers import make_searcher
from tests.report.synthetic import write_folder

SETTINGS = {"units": 14, "tightness": 0.2, "tightest": 0.9, "unequal": True}
POINTS = [(100, 8.0), (130, 5.0), (150, 6.0), (180, 1.0), (200, 0.5)]


def by_hand(points: list[tuple[int, float]], measure: Measure) -> float:
    """Mean over every whole budget but the last of the least loss within it, the reference's where there is none."""
    losses = [
        min([x for c, x in points if c <= budget] + [measure.loss]) for budget in range(measure.foot, measure.budget)
    ]
    return math.exp(np.mean(np.log(losses))) if measure.geometric else float(np.mean(losses))


@pytest.mark.parametrize("geometric", [False, True])
@pytest.mark.parametrize(
    "points", [POINTS, POINTS[1:], POINTS[:1], [(90, 7.0), *POINTS], [(100, 11.0)], [], [(110, math.nan), (160, 3.0)]]
)
def test_the_mean_loss_over_all_budgets_is_what_a_sum_over_them_gives(
    points: list[tuple[int, float]], geometric: bool
) -> None:
    measure = Measure(100, 200, 9.0, geometric)
    known = [p for p in points if not math.isnan(p[1])]
    assert measure.mean(points) == pytest.approx(by_hand(known, measure), rel=1e-12)
    width = math.log(9.0) if geometric else 9.0
    mean = math.log(measure.mean(points)) if geometric else measure.mean(points)
    assert measure.hypervolume(points) == pytest.approx(width - mean)


def test_a_loss_of_nothing_counts_on_a_scale_of_logarithms() -> None:
    assert 0 < Measure(0, 10, 1.0, geometric=True).mean([(0, 0.0)]) < 1e-11


def test_at_a_budget_the_dearest_point_that_fits_is_picked() -> None:
    front = [FrontPoint((i,), cost, loss) for i, (cost, loss) in enumerate(POINTS)]
    assert [picked(front, budget) for budget in (99, 100, 179, 500)] == [None, front[0], front[2], front[4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uniform and two searchers over a range, two seeds."""
    searchers: list[tuple[str, str, dict[str, object]]] = [
        (name, name, {}) for name in ("uniform", "random", "evopress_front")
    ]
    made = write_folder(
        tmp_path_factory.mktemp("fronts"), [noisy(**SETTINGS)], searchers, (0, 1), Budget(tokens=1024 * 120)
    )
    Comparison.read(made).write_profiles()
    return made


def test_the_reference_point_is_uniforms_worst_for_all_searches_alike(folder: Path) -> None:
    comparison = Comparison.read(folder)
    problem, records = comparison.problems["noisy"], comparison.records()
    uniform = next(r for r in records if r.searcher == "uniform")
    worst = max(p.held_out["loss"] for p in uniform.checkpoints[-1].front)
    assert measures(problem, records) == {"loss": Measure(problem.space.floor, problem.space.budget, worst, False)}
    others = [r for r in records if r.searcher != "uniform"]
    without = max(p.held_out["loss"] for r in others for p in r.checkpoints[-1].front)
    assert measures(problem, others)["loss"].loss == without


def test_searches_over_a_range_are_judged_by_their_mean_and_others_by_their_loss(folder: Path) -> None:
    comparison = Comparison.read(folder)
    records = comparison.records()
    problem = comparison.problems["noisy"]
    found = judged(comparison.problems, records)[1]
    measure = measures(problem, records)["loss"]
    for raw, shown in zip(records, found, strict=True):
        for before, after in zip(raw.checkpoints, shown.checkpoints, strict=True):
            points = [(p.cost, p.held_out["loss"]) for p in before.front]
            assert after.held_out == {"loss": pytest.approx(by_hand(points, measure))}
            assert after.front == before.front
    single = ProblemRecord("noisy", additive(units=5).space)
    assert judged({"noisy": single}, records) == ({"noisy": single}, records)


def test_the_folder_keeps_every_front_as_json_and_csv_and_says_who_won(folder: Path) -> None:
    comparison = Comparison.read(folder)
    records = comparison.records()
    best = winner(judged(comparison.problems, records)[1])
    assert best is not None
    kept = {path.name for path in (folder / "fronts").iterdir()}
    assert kept == {f"{name}.{kind}" for name in [*(r.search for r in records), "winner"] for kind in ("json", "csv")}
    assert json.loads((folder / "profiles" / "winner.json").read_text())["search"] == best.search
    front = json.loads((folder / "fronts" / "winner.json").read_text())
    assert (front["search"], front["reference"]["loss"]["geometric"]) == (best.search, False)
    rows = (folder / "fronts" / "winner.csv").read_text().splitlines()
    assert rows[0] == "cost,average,calibration loss,held-out loss,levels"
    assert len(rows) == len(front["points"]) + 1 == len(best.checkpoints[-1].front) + 1
    assert [int(row.split(",")[0]) for row in rows[1:]] == [p["cost"] for p in front["points"]]


# ---------------------------------------------------------------------- journals


def journalled(path: Path, problem: Problem, *, resume: bool = False) -> SearchRecord:
    budget, searcher = Budget(evaluations=40), "evopress_front"
    header = search_header(f"{searcher}-s0", searcher, problem, budget, checkpoints=[0.5, 1.0])
    with Journal.open(path, header, resume=resume) as journal:
        made = make_searcher(searcher, problem.space, seed=0)
        search(made, problem, budget=budget, journal=journal, checkpoints=[0.5, 1.0])
    return read_journal(path)


def test_a_journal_keeps_the_front_and_the_cost_of_every_trial_once(tmp_path: Path) -> None:
    problem = additive(**SETTINGS)
    record = journalled(tmp_path / "a.jsonl", problem)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    trials = [line for line in lines if line["kind"] == "outcome"]
    assert [t["trial"] for t in trials] == list(range(len(trials)))
    assert [t["cost"] for t in trials] == [problem.space.cost(o.trial.levels) for o in record.outcomes]
    assert [len(c.front) > 5 for c in record.checkpoints] == [True, True]
    assert record.space == problem.space
    for point in record.checkpoints[-1].front:
        assert point.cost == problem.space.cost(point.levels)
        assert point.held_out["loss"] == problem.function(point.levels)


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_resumed_search_ends_with_the_same_front(tmp_path: Path, share: float) -> None:
    problem = additive(**SETTINGS)
    whole = journalled(tmp_path / "whole.jsonl", problem)
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_bytes(b"".join(lines[: round(share * len(lines))]))
    again = journalled(tmp_path / "part.jsonl", problem, resume=True)
    assert [o.trial for o in again.outcomes] == [o.trial for o in whole.outcomes]
    assert [c.front for c in again.checkpoints] == [c.front for c in whole.checkpoints]


def test_a_range_is_no_resume_of_a_single_budget(tmp_path: Path) -> None:
    settings = {k: v for k, v in SETTINGS.items() if k != "tightest"}
    journalled(tmp_path / "a.jsonl", additive(**settings))
    with pytest.raises(JournalError, match="belongs to another search"):
        journalled(tmp_path / "a.jsonl", additive(**SETTINGS), resume=True)


def test_a_journal_of_a_single_budget_says_nothing_of_costs_and_fronts(tmp_path: Path) -> None:
    journalled(tmp_path / "a.jsonl", additive(units=14))
    text = (tmp_path / "a.jsonl").read_text()
    assert '"cost"' not in text.partition("\n")[2]
    assert '"front"' not in text


def test_a_known_front_is_the_optimum_at_the_marks() -> None:
    problem = additive(**SETTINGS)
    record = ProblemRecord.of("additive", problem)
    again = ProblemRecord.from_json("additive", json.loads(json.dumps(record.to_json())))
    assert again == record
    least = [FrontPoint((), c, x, {"loss": x}) for c, x in problem.optima]
    best = [p for mark in marks(problem.space) if (p := picked(least, mark))]
    shown = judged({"additive": record}, list[SearchRecord]())[0]["additive"]
    assert shown.optimum is None  # nothing to measure it by yet
    assert len(best) == 21
