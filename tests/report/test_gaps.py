"""Problems of which every seed has an instance of its own: losses become gaps, seed by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evo_hpo.record.comparison import Comparison
from evo_hpo.record.problem_record import ProblemRecord
from evo_hpo.report.gaps import as_gaps
from evo_hpo.report.results import Results
from evo_hpo.report.search_run import SearchRun
from evo_hpo.report.summary import summarise
from evo_hpo.run.plan import make_plan
from evo_hpo.run.schedule import compare
from evo_hpo.search.loop import Checkpoint
from evo_hpo.search.registry import make_problem
from tests.run.test_plan import plan_data


def run(searcher: str, seed: int, *losses: float, problem: str = "p") -> SearchRun:
    """A search with held-out losses along its budget."""
    taken = tuple(Checkpoint(1.0, 0, 1, 0.0, (0,), {"loss": loss, "average": 3.0}) for loss in losses)
    return SearchRun(f"{searcher}-s{seed}", problem, searcher, searcher, seed, checkpoints=taken)


def problem(*optima: float | None) -> ProblemRecord:
    """A problem with an instance for each optimum."""
    made = ProblemRecord.of("p", make_problem("additive", units=4), 0)
    return ProblemRecord("p", made.space, instances={str(i): {"optimum": x} for i, x in enumerate(optima)})


def losses(runs: list[SearchRun]) -> dict[str, list[float]]:
    """Search -> held-out losses."""
    return {r.id: [c.held_out["loss"] for c in r.checkpoints] for r in runs}


def test_gaps_are_percent_of_the_way_from_the_optimum_of_the_instance_to_uniform() -> None:
    runs = [run("uniform", 0, 10.0), run("a", 0, 7.5, 5.0), run("uniform", 1, 3.0), run("a", 1, 4.0)]
    found, shown, unmeasured = as_gaps({"p": problem(5.0, 2.0)}, runs)
    assert losses(shown) == {"uniform-s0": [100], "a-s0": [50, 0], "uniform-s1": [100], "a-s1": [200]}
    assert shown[1].checkpoints[0].held_out["average"] == 3.0
    assert found["p"].optimum == 0.0
    assert found["p"].loss_name == "gap to the best known loss (uniform = 100)"
    assert not unmeasured


def test_without_an_optimum_the_best_loss_of_any_search_on_the_instance_is_the_best_known() -> None:
    runs = [run("uniform", 0, 10.0), run("a", 0, 6.0, 7.0), run("b", 0, 8.0), run("uniform", 1, 10.0)]
    found, shown, _ = as_gaps({"p": problem(None, 1.0)}, runs)
    assert losses(shown) == {"uniform-s0": [100], "a-s0": [0, 25], "b-s0": [50], "uniform-s1": [100]}
    assert found["p"].optimum is None


def test_a_searcher_no_better_than_uniform_has_a_gap_of_nothing_where_nothing_better_is_known() -> None:
    assert losses(as_gaps({"p": problem(None)}, [run("uniform", 0, 10.0)])[1]) == {"uniform-s0": [0.0]}


def test_searches_on_an_instance_without_uniform_wait_and_other_problems_are_left_alone() -> None:
    other = ProblemRecord("q", problem(None).space)
    runs = [run("a", 0, 6.0), run("a", 1, 6.0, problem="q")]
    found, shown, unmeasured = as_gaps({"p": problem(None), "q": other}, runs)
    assert shown == [runs[1]]
    assert found["q"] is other
    assert unmeasured.keys() == {"a-s0"}


def test_a_report_pairs_by_seed_and_counts_the_instances_whose_optimum_was_found(tmp_path: Path) -> None:
    """Against gaps worked out from the problems themselves."""
    searchers: list[dict[str, Any]] = [{"name": "uniform"}, {"name": "trust_region"}]
    data = plan_data(searchers=searchers, budget={"evaluations": 40}, seeds=3)
    data["problems"] = [{"name": "additive", "settings": {"units": 8}, "instance": "seed"}]
    folder = compare(make_plan(data), root=tmp_path)
    table = Results.load(folder).pairs()
    for record in Comparison.read(folder).records():
        made = make_problem("additive", units=8, seed=record.seed)
        best, uniform = made.optimum, made.validate(made.space.uniform())["loss"]
        assert best is not None
        gap = 100 * (record.loss - best) / (uniform - best)
        assert table.loc[("additive", record.seed), record.label] == pytest.approx(gap, abs=1e-9)
    assert summarise(Results.load(folder)).pairs == 3
