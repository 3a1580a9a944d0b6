import io
import re
from collections.abc import Iterator, Sequence

import pytest
from rich.console import Console

from evo_hpo.cli.progress import BuildProgress, ComparisonProgress, _amount
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


def heard_by(console: Console, *told: events.Event, label: str = "additive") -> ComparisonProgress:
    """The progress of a comparison of 20 evaluations each, while it goes on."""
    data = {
        "name": "x",
        "seeds": [0],
        "budget": {"evaluations": 20},
        "problems": [{"name": "additive", "label": label}],
        "searchers": [{"name": "evopress"}],
    }
    progress = ComparisonProgress(make_plan(data), console)
    with progress:
        for event in told:
            progress(event)
    return progress


@pytest.mark.parametrize("replayed", [0, 10])
def test_the_time_left_is_of_what_is_scored_now(
    console: Console, monkeypatch: pytest.MonkeyPatch, replayed: int
) -> None:
    now = [1000.0]
    monkeypatch.setattr("evo_hpo.cli.progress.time.monotonic", lambda: now[0])
    search = "evopress-s0"

    def scored() -> Iterator[events.Event]:
        yield events.SearchStarted(search)
        for trial in range(1, 21):
            now[0] += 0 if trial <= replayed else 60
            yield events.BatchScored(search, trial, trial, 0.5, 0, replayed=trial <= replayed)

    progress = heard_by(console)
    for event in scored():
        progress(event)
    said = {line.split()[1]: line.rpartition(", ")[2] for line in lines(console) if " of 20 " in line}
    journal = "from its journal"
    before = {"5": journal, "10": journal} if replayed else {"5": "900 s left", "10": "600 s left"}
    assert said == before | {"15": "300 s left", "20": "0 s left"}


def screen(told: Sequence[events.Event], label: str = "additive") -> str:
    """What a terminal shows last."""
    console = Console(file=io.StringIO(), width=150, force_terminal=True)
    heard_by(console, *told, label=label)
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


def test_a_terminal_shows_each_search_and_all_of_them() -> None:
    started = events.SearchStarted("evopress-s0")
    batches = [events.BatchScored("evopress-s0", n, n, 1 / n, 0) for n in (4, 8)]
    shown = screen([started, *batches, events.CheckpointTaken("evopress-s0", {"loss": 0.25}), batches[-1]])
    assert "8/20 evaluations best 0.125 held-out 0.25" in shown
    assert "0/1 searches" in shown
    ended = screen([started, *batches, events.SearchEnded("evopress-s0", "the budget is spent")])
    assert "evopress-s0: finished, 8 evaluations, 8 trials, best 0.125 (the budget is spent)" in ended
    assert "1/1 searches" in ended
    assert "evopress-s0: started" not in ended


def test_a_search_that_fails_is_named_with_its_reason(console: Console) -> None:
    heard_by(console, events.SearchStarted("evopress-s0"), events.SearchFailed("evopress-s0", "no memory [/x]"))
    assert lines(console) == ["evopress-s0: started", "evopress-s0: failed: no memory [/x]"]


def test_names_that_look_like_markup_are_shown_as_they_are() -> None:
    output = io.StringIO()
    with BuildProgress("", Console(file=output, force_terminal=True, width=150)) as progress:
        progress(3, 10, "layer [/y]", "p [/x] q")
    assert "p [/x] q" in output.getvalue()
    assert re.search(r"3/10 layer \[/y\]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue()))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"), (7.5, "7.5"), (950, "950"), (999.4, "999"), (999.6, "1k"), (12_345, "12.3k"), (999_400, "999k"),
        (999_600, "1M"), (4.5e6, "4.5M"), (1.5e9, "1.5G"), (9.996e11, "1T"), (2.5e12, "2.5T"),
    ],
)  # fmt: skip
def test_an_amount_has_five_characters_at_most(value: float, expected: str) -> None:
    assert _amount(value) == expected
