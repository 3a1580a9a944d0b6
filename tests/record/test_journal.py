"""The journal: durable, replayable, refusing what is not its own."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evo_hpo import (
    Assignment,
    Batch,
    Budget,
    CompressionSpace,
    FunctionProblem,
    Minibatch,
    Outcome,
    SearchResult,
    Terms,
    Trial,
    Unit,
)
from evo_hpo.errors import JournalError
from evo_hpo.record.journal import Journal, header_differences, read_journal, read_journals, search_header
from evo_hpo.record.lines import decode_levels, encode_levels
from evo_hpo.record.records import JournalTail
from evo_hpo.search.budget import Allowance
from evo_hpo.search.loop import search
from evo_hpo.search.searcher import Searcher

UNITS = 6


class Walk(Searcher):
    """Batches of random neighbours of the best so far; what it asks depends on all it was told."""

    def __init__(self, space: CompressionSpace, *, seed: int = 0, batch: int = 3) -> None:
        super().__init__(space, seed=seed)
        self.batch = batch
        self.generation = 0

    def ask(self, allowance: Allowance) -> Batch:
        self.generation += 1
        parent = self._best.trial if self._best else None
        around = parent.levels if parent else self.space.uniform()
        trials = [
            self.trial(
                self.space.repair([k + int(self.rng.integers(-1, 2)) for k in around]),
                parent=parent.number if parent else None,
                note="a step",
            )
            for _ in range(self.batch)
        ]
        return Batch(tuple(trials), Terms(draw="fresh", generation=self.generation))

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        self.remember(outcomes)


def loss(levels: Assignment) -> float:
    if levels[0] == 0 and levels[1] == 2:
        raise ValueError("a hole in the landscape")
    return sum((k - 1.3) ** 2 * (i + 1) for i, k in enumerate(levels))


@pytest.fixture
def space() -> CompressionSpace:
    return CompressionSpace([Unit(f"layers.{i}.proj", (2, 3, 4)) for i in range(UNITS)], 3 * UNITS)


@pytest.fixture
def problem(space: CompressionSpace) -> FunctionProblem:
    return FunctionProblem(space, loss)


Runner = Callable[..., SearchResult]


@pytest.fixture
def run(problem: FunctionProblem, space: CompressionSpace) -> Runner:
    def start(path: Path, *, trials: int = 20, resume: bool = False, searcher: Searcher | None = None) -> SearchResult:
        budget = Budget(evaluations=trials)
        header = search_header("walk-s1", "walk", problem, budget, seed=1, checkpoints=(0.5, 1.0))
        with Journal.open(path, header, resume=resume) as journal:
            return search(
                searcher or Walk(space, seed=1),
                problem,
                budget=budget,
                seed=1,
                journal=journal,
                checkpoints=(0.5, 1.0),
            )

    return start


def fail(levels: Assignment) -> float:
    raise KeyboardInterrupt(f"scored {levels}")  # passes through, unlike an exception of a trial


def values(outcomes: Sequence[Outcome]) -> list[tuple[Any, ...]]:
    """Everything but how long it took."""
    return [(o.trial, o.loss, o.tokens, o.minibatch, o.status, o.reason) for o in outcomes]


def test_a_journal_gives_back_what_the_search_did(run: Runner, tmp_path: Path, space: CompressionSpace) -> None:
    result = run(tmp_path / "walk-s1.jsonl")
    record = read_journal(tmp_path / "walk-s1.jsonl")
    assert values(record.outcomes) == values(result.outcomes)
    assert record.checkpoints == result.checkpoints
    assert (record.best, record.best_loss, record.finished) == (result.best, result.best_loss, True)
    assert (record.search, record.searcher, record.seed, record.space) == ("walk-s1", "walk", 1, space)
    assert record.batches == [3] * 6 + [2]
    assert len(record.times) == 20
    assert any(o.status == "failed" and math.isinf(o.loss) and "hole" in o.reason for o in record.outcomes)


def test_every_line_is_json_of_its_own(run: Runner, tmp_path: Path) -> None:
    run(tmp_path / "j.jsonl")
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("outcome") == 20
    assert lines[0]["kind"] == "header"
    assert lines[-1]["kind"] == "end"
    assert {line["search"] for line in lines} == {"walk-s1"}
    assert {"versions", "git", "machine", "fingerprint", "budget", "settings", "space"} <= lines[0].keys()


@pytest.mark.parametrize("cut", [1, 40, 400, 2000, 5000, 9000, 10**6])
def test_resumed_from_any_cut_equals_uninterrupted(run: Runner, tmp_path: Path, cut: int) -> None:
    whole = run(tmp_path / "whole.jsonl")
    data = (tmp_path / "whole.jsonl").read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(data[: max(len(data) - cut, 0)])
    resumed = run(tmp_path / "cut.jsonl", resume=True)
    assert values(resumed.outcomes) == values(whole.outcomes)
    assert [c.levels for c in resumed.checkpoints] == [c.levels for c in whole.checkpoints]
    record = read_journal(tmp_path / "cut.jsonl")
    assert values(record.outcomes) == values(whole.outcomes)
    assert record.finished


def test_resuming_a_finished_search_scores_nothing(run: Runner, tmp_path: Path, problem: FunctionProblem) -> None:
    run(tmp_path / "j.jsonl")
    before = (tmp_path / "j.jsonl").read_bytes()
    problem.function = fail
    assert len(run(tmp_path / "j.jsonl", resume=True).outcomes) == 20
    assert (tmp_path / "j.jsonl").read_bytes() == before


def test_an_existing_journal_is_not_overwritten(run: Runner, tmp_path: Path) -> None:
    run(tmp_path / "j.jsonl")
    with pytest.raises(JournalError, match="exists already"):
        run(tmp_path / "j.jsonl")


def test_another_budget_is_refused_with_the_difference(run: Runner, tmp_path: Path) -> None:
    run(tmp_path / "j.jsonl")
    with pytest.raises(JournalError, match=r"budget\.evaluations: was 20, is 30"):
        run(tmp_path / "j.jsonl", trials=30, resume=True)


def test_another_machine_or_version_is_not(problem: FunctionProblem) -> None:
    old = search_header("a-s0", "a", problem, Budget(evaluations=3))
    new = {**old, "created": 0.0, "versions": {}, "git": {"commit": "other"}, "machine": {}}
    assert header_differences(old, new) == {}
    assert set(header_differences(old, {**new, "fingerprint": {"problem": "function", "space": "x"}})) == {
        "fingerprint.space"
    }


def test_a_searcher_that_asks_for_something_else_is_refused(
    run: Runner, tmp_path: Path, space: CompressionSpace
) -> None:
    run(tmp_path / "j.jsonl")
    with pytest.raises(JournalError, match=r"trial 0 .* unit \d recorded at level \d, asked at \d"):
        run(tmp_path / "j.jsonl", resume=True, searcher=Walk(space, seed=2))
    with pytest.raises(JournalError, match="a batch of 3 is recorded and 4 are asked"):
        run(tmp_path / "j.jsonl", resume=True, searcher=Walk(space, seed=1, batch=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 7}, "tokens recorded as None, asked as 7"),
        ({"draw": "same"}, "draw recorded as 'fixed', asked as 'same'"),
        ({"parent": 3}, "parent recorded as None, asked as 3"),
        ({"keep": 2}, "keep recorded as None, asked as 2"),
        ({"by_sequence": True}, "by_sequence recorded as False, asked as True"),
        ({"note": "other words"}, ""),
    ],
)
def test_recall_compares_every_field(
    problem: FunctionProblem, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    header = search_header("a-s0", "a", problem, Budget(evaluations=9))
    trial = Trial(0, problem.space.uniform())
    with Journal.open(tmp_path / "j.jsonl", header) as journal:
        journal.record([Outcome(trial, 1.0, 5, 0.1, minibatch=11)])
    of_trial = {key: value for key, value in change.items() if key in Trial.__slots__}
    of_batch = {key: value for key, value in change.items() if key not in of_trial}
    asked = Batch((replace(trial, **of_trial),), Terms(**of_batch))
    with Journal.open(tmp_path / "j.jsonl", header, resume=True) as journal:
        if message:
            with pytest.raises(JournalError, match=message):
                journal.recall(asked, Minibatch(11, 5))
        else:
            assert journal.recall(asked, Minibatch(11, 5))[0].loss == 1.0
    with (
        Journal.open(tmp_path / "j.jsonl", header, resume=True) as journal,
        pytest.raises(JournalError, match="recorded on minibatch 11, asked on 12"),
    ):
        journal.recall(Batch((trial,)), Minibatch(12, 5))


@pytest.mark.parametrize("parts", [(1 / 3, 2**0.5, 5e-324, 0.1 + 0.2), (1.0,), None])
@pytest.mark.parametrize("asked", [True, False])
def test_losses_by_sequence_are_kept_to_the_bit_and_only_where_asked(
    problem: FunctionProblem, tmp_path: Path, parts: tuple[float, ...] | None, asked: bool
) -> None:
    header = search_header("a-s0", "a", problem, Budget(evaluations=9))
    trial, terms = Trial(0, problem.space.uniform()), Terms(by_sequence=asked)
    given = Outcome(trial, 1.0, 5, 0.1, minibatch=11, terms=terms, by_sequence=parts if asked else None)
    with Journal.open(tmp_path / "j.jsonl", header) as journal:
        journal.record([given])
    line = json.loads((tmp_path / "j.jsonl").read_text().splitlines()[1])
    assert ("by_sequence" in line) == asked  # a line of a search that does not ask is what it was
    with Journal.open(tmp_path / "j.jsonl", header, resume=True) as journal:
        assert journal.recall(Batch((trial,), terms), Minibatch(11, 5)) == [given]


def test_two_processes_cannot_write_one_journal(problem: FunctionProblem, tmp_path: Path) -> None:
    header = search_header("a-s0", "a", problem, Budget(evaluations=9))
    with (
        Journal.open(tmp_path / "j.jsonl", header),
        pytest.raises(JournalError, match="another process is writing"),
    ):
        Journal.open(tmp_path / "j.jsonl", header, resume=True)


def test_an_unfinished_batch_does_not_exist(run: Runner, tmp_path: Path) -> None:
    run(tmp_path / "j.jsonl")
    lines = (tmp_path / "j.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "j.jsonl").write_bytes(b"".join(lines[:6]))  # header, one batch of three, two of the next
    assert len(read_journal(tmp_path / "j.jsonl").outcomes) == 3
    tail = JournalTail(tmp_path / "j.jsonl")
    assert len(tail.poll()) == 4
    with (tmp_path / "j.jsonl").open("ab") as file:
        file.write(lines[6])
    assert len(tail.poll()) == 3


def test_damage_in_the_middle_is_an_error(run: Runner, tmp_path: Path) -> None:
    run(tmp_path / "j.jsonl")
    data = (tmp_path / "j.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "j.jsonl").write_bytes(b"".join([*data[:3], b"{not json\n", *data[3:]]))
    with pytest.raises(JournalError, match="is damaged"):
        read_journal(tmp_path / "j.jsonl")
    (tmp_path / "j.jsonl").write_bytes(b'{"kind":"outcome"}\n')
    with pytest.raises(JournalError, match="no header"):
        read_journal(tmp_path / "j.jsonl")


def test_a_line_that_lacks_something_is_named(run: Runner, tmp_path: Path) -> None:
    run(tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    lines[3] = json.dumps({k: v for k, v in json.loads(lines[3]).items() if k != "loss"}) + "\n"
    (tmp_path / "a.jsonl").write_text("".join(lines))
    with pytest.raises(JournalError, match=r"a.jsonl: line 4 cannot be read \(KeyError\('loss'\)\)"):
        read_journal(tmp_path / "a.jsonl")


def test_a_folder_is_read_sorted_and_torn_headers_are_left_out(run: Runner, tmp_path: Path) -> None:
    run(tmp_path / "journals" / "b.jsonl")
    run(tmp_path / "journals" / "a.jsonl")
    (tmp_path / "journals" / "c.jsonl").write_bytes(b'{"kind":"hea')
    assert [r.path.name for r in read_journals(tmp_path)] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(JournalError, match="no journals"):
        read_journals(tmp_path / "nowhere")


@pytest.mark.parametrize("levels", [(0, 1, 35), (0, 36), (40,), (7,), (9, 10, 11)])
def test_levels_survive_as_text(levels: Assignment) -> None:
    assert decode_levels(encode_levels(levels)) == levels


def test_hostile_notes_reasons_and_numbers_survive(problem: FunctionProblem, tmp_path: Path) -> None:
    header = search_header(
        "a-s0", "a", problem, Budget(evaluations=9), settings={"path": tmp_path, "inf": math.inf, "text": "x" * 10_000}
    )
    note = "line\nbreak \" ' \\ \x00 \u2028 ü \ud800" + "y" * 10_000
    trial = Trial(0, problem.space.uniform(), note=note)
    with Journal.open(tmp_path / "j.jsonl", header) as journal:
        journal.record([Outcome(trial, -math.inf, 0), Outcome(trial, math.nan, 0), Outcome(trial, 1e-300, 0)])
    record = read_journal(tmp_path / "j.jsonl")
    assert record.outcomes[0].trial.note == note
    assert [str(o.loss) for o in record.outcomes] == ["-inf", "nan", "1e-300"]
    assert record.header["settings"]["text"] == "x" * 10_000
    Journal.open(tmp_path / "j.jsonl", header, resume=True).close()


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """Limits the size that this process may give a file: writing beyond it fails like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_loses_nothing(run: Runner, tmp_path: Path, limited: Callable[[int], None]) -> None:
    whole = run(tmp_path / "whole.jsonl")
    size = os.path.getsize(tmp_path / "whole.jsonl")
    limited(size - 1500)
    with pytest.raises(JournalError, match=r"cannot write .* free some space and resume"):
        run(tmp_path / "full.jsonl")
    kept = read_journal(tmp_path / "full.jsonl")
    assert values(kept.outcomes) == values(whole.outcomes)[: len(kept.outcomes)]
    assert (tmp_path / "full.jsonl").read_bytes().endswith(b"}\n")
    limited(resource.RLIM_INFINITY)
    assert values(run(tmp_path / "full.jsonl", resume=True).outcomes) == values(whole.outcomes)


def test_what_could_not_be_written_is_kept_and_written_later(
    problem: FunctionProblem, tmp_path: Path, limited: Callable[[int], None]
) -> None:
    header = search_header("a-s0", "a", problem, Budget(evaluations=9))
    journal = Journal.open(tmp_path / "j.jsonl", header)
    limited(os.path.getsize(tmp_path / "j.jsonl") + 50)
    with pytest.raises(JournalError):
        journal.record([Outcome(Trial(0, problem.space.uniform()), 1.5)])
    assert len(journal.unsaved) == 1
    limited(resource.RLIM_INFINITY)
    journal.close()
    assert read_journal(tmp_path / "j.jsonl").outcomes[0].loss == 1.5
