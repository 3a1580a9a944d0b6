"""The table of fronts and their picture, on fronts made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evo_hpo import CompressionSpace, Unit
from evo_hpo.record.fronts import judged, picked
from evo_hpo.record.problem_record import ProblemRecord
from evo_hpo.report.findings import Findings
from evo_hpo.report.fronts import attained, front_figure, front_sheets
from evo_hpo.report.page import Sheet
from evo_hpo.report.search_run import SearchRun
from evo_hpo.search.checkpoint import Checkpoint, FrontPoint
from evo_hpo.space.ranges import foot, spanning

UNITS = [Unit(f"u{i}", (1, 2, 3), levels=("1", "2", "3")) for i in range(10)]
SPACE = spanning(CompressionSpace(UNITS, 10), CompressionSpace(UNITS, 30))
UNIFORM = {10: 4.0, 15: 3.0, 20: 2.0, 25: 1.0, 30: 0.5}


def of_cost(cost: int) -> tuple[int, ...]:
    """An assignment of this cost: 10 units of cost 1 to 3."""
    return tuple(min(2, max(0, cost - 10 - 2 * i)) for i in range(10))


def search(label: str, seed: int, points: dict[int, float], *, finished: bool = True, fixed: bool = False) -> SearchRun:
    front = tuple(FrontPoint(of_cost(cost), cost, loss, {"loss": loss}) for cost, loss in points.items())
    taken = (Checkpoint(1.0, 100, 10, 1.0, front[-1].levels, {"loss": math.nan}, front),) if front else ()
    name = f"{label}-s{seed}"
    return SearchRun(
        name, "p", label, label, seed, checkpoints=taken, finished=finished, deterministic=fixed or label == "uniform"
    )


def made(*runs: SearchRun) -> Findings:
    problems, shown = judged({"p": ProblemRecord("p", SPACE)}, [*runs, search("uniform", 0, UNIFORM)])
    return Findings("made", problems, tuple(shown))


def cells(found: Findings) -> tuple[Sheet, dict[str, tuple[str, ...]]]:
    """The table, and of each searcher the cells at the five budgets: 10, 15, 20, 25 and 30."""
    (sheet,) = front_sheets(found, "p")
    return sheet, {row[0]: row[3:] for row in sheet.rows}


def better(seed: int) -> dict[int, float]:
    return {10: 2.0 + seed / 1000, 15: 1.0, 20: 0.5, 25: 0.3, 30: 0.1}


def worse(seed: int) -> dict[int, float]:
    return {10: 3.9 + seed / 1000, 15: 2.9, 20: 1.9, 25: 0.9, 30: 0.4}


def test_what_loses_more_in_every_seed_has_a_star_and_nothing_else() -> None:
    """Ten seeds, two searchers against the best at five budgets: 2 / 2^10 times ten comparisons is below 0.05."""
    _, found = cells(made(*(search(k, s, of(s)) for s in range(10) for k, of in (("a", better), ("b", worse)))))
    assert not any("*" in cell for cell in found["a"])
    assert all(cell.endswith(" *") for cell in (*found["b"], *found["uniform"]))


def test_unfinished_searches_are_shown_but_not_tested() -> None:
    half = [search("b", s, worse(s), finished=False) for s in range(10)]
    _, found = cells(made(*(search("a", s, better(s)) for s in range(10)), *half))
    assert found["b"][1] == "2.900"
    assert not any("*" in cell for cell in found["b"])
    assert all("*" in cell for cell in found["uniform"])


def test_two_searchers_without_chance_are_no_test() -> None:
    found = made(search("exact", 0, better(0), fixed=True), *(search("b", s, worse(s)) for s in range(10)))
    _, shown = cells(found)
    assert all("*" in cell for cell in shown["b"])
    assert not any("*" in cell for cell in shown["uniform"])


def test_a_searcher_without_any_front_stands_last() -> None:
    waiting = [search("waiting", s, {}, finished=False) for s in range(2)]
    found = made(*(search("b", s, worse(s)) for s in range(2)), *waiting, search("a", 0, better(0)))
    sheet, shown = cells(found)
    assert [row[0] for row in sheet.rows] == ["a", "b", "uniform", "waiting"]
    assert sheet.strong == (0,)
    assert set(shown["waiting"]) == {"–"}
    legend = front_figure(found, "p").axes[0].get_legend()
    assert legend is not None
    assert [text.get_text().split()[0] for text in legend.get_texts()] == ["a", "b", "uniform"]


def test_seeds_without_a_point_are_counted_and_lose() -> None:
    """Only one of ten seeds of b fits at 10, with the least loss of all: a is the better one there."""
    points = [{**({10: 1.0} if s == 0 else {}), **{c: x for c, x in worse(s).items() if c > 10}} for s in range(10)]
    sheet, found = cells(made(*(search("a", s, better(s)) for s in range(10)), *map_seeds("b", points)))
    assert found["b"][0] == "1.000 (1 of 10 seeds) *"
    assert not found["a"][0].endswith("*")
    assert found["b"][1] == "2.900 *"
    assert "the seeds that have one" in sheet.note
    whole, _ = cells(made(search("a", 0, better(0))))
    assert "the seeds that have one" not in whole.note


def map_seeds(label: str, points: list[dict[int, float]]) -> list[SearchRun]:
    return [search(label, seed, of) for seed, of in enumerate(points)]


def test_the_table_says_what_pick_takes_and_the_picture_the_least_loss_within() -> None:
    """At 20 the dearest point that fits loses more than a cheaper one."""
    points = {10: 2.0, 15: 0.2, 20: 0.9, 30: 0.1}
    found = made(search("a", 0, points))
    band = attained(found, "p", "a", "loss")
    front = found.of("p", "a")[0].checkpoints[-1].front
    assert foot(SPACE) == 10
    for at, taken, least in ((10, 2.0, 2.0), (17, 0.2, 0.2), (20, 0.9, 0.2), (24, 0.9, 0.2), (30, 0.1, 0.1)):
        point = picked(front, at)
        assert point is not None
        assert point.held_out["loss"] == taken
        assert band.middle[np.searchsorted(band.x, at)] == least
    assert cells(found)[1]["a"] == ("2.000", "0.2000", "0.9000", "0.9000", "0.1000")
    line = next(line for line in front_figure(found, "p").axes[0].get_lines() if str(line.get_label()).startswith("a "))
    assert line.get_drawstyle() == "steps-post"
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx(band.middle.tolist())
