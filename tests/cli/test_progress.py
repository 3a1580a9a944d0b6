import io

import pytest
from rich.console import Console

from evo_hpo.cli.progress import BuildProgress, ComparisonProgress
from evo_hpo.record.problem_record import ProblemRecord
from evo_hpo.run import events
from evo_hpo.run.plan import make_plan
from evo_hpo.search.registry import make_problem


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_every_tenth_is_said_once_and_of_the_next_store_again(console: Console) -> None:
    with BuildProgress("", console) as progress:
        for _ in range(2):  # a joined store builds two of one title
            for done in range(41):
                progress(done, 40, "layer", "model")
    said = [line.partition(" layer")[0] for line in lines(console)]
    assert said == 2 * [f"model: {done} of 40" for done in range(0, 41, 4)]


def test_a_count_that_goes_back_before_its_end_is_not_said_again(console: Console) -> None:
    with BuildProgress("build", console) as progress:
        for done in (0, 2, 1, 2, 3):  # layers end in any order
            progress(done, 10)
    assert len(lines(console)) == 3


@pytest.mark.parametrize(("settings", "expected"), [({}, "best 0.5"), ({"tightest": 0.9}, "of any budget: best 0.5")])
def test_over_a_range_the_least_loss_is_said_to_be_of_any_budget(
    console: Console, settings: dict[str, float], expected: str
) -> None:
    data = {
        "name": "x",
        "seeds": [0],
        "budget": {"evaluations": 10},
        "problems": [{"name": "additive", "settings": settings}],
        "searchers": [{"name": "evopress"}],
    }
    with ComparisonProgress(make_plan(data), console) as progress:
        progress(events.ProblemMade(ProblemRecord.of("additive", make_problem("additive", **settings))))
        progress(events.SearchStarted("evopress-s0"))
        progress(events.BatchScored("evopress-s0", 5, 5, 0.5, 0))
        progress(events.SearchEnded("evopress-s0", "the budget is spent"))
    assert f"evopress-s0: finished, 5 evaluations, 5 trials, {expected} (the budget is spent)" in lines(console)
