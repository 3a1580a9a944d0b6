"""The comparison's folder: what is recorded and read again, who won, and what is refused on resume."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evo_hpo import Budget, CompressionSpace, FunctionProblem, Unit, search
from evo_hpo.errors import JournalError, PlanError
from evo_hpo.record.changes import changes, flat, told
from evo_hpo.record.comparison import Comparison, PlannedSearch, winner
from evo_hpo.record.journal import Journal, search_header
from evo_hpo.record.problem_record import ProblemRecord
from searchers import make_searcher


@dataclass(frozen=True)
class Found:
    """A result: who, and how well."""

    label: str
    loss: float


def test_the_winner_has_the_least_loss_then_the_least_median_then_the_first_place() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        results = [Found(str(rng.choice(list("abc"))), float(rng.integers(3))) for _ in range(rng.integers(1, 9))]
        least = [r for r in results if r.loss == min(s.loss for s in results)]
        medians = {r.label: statistics.median(s.loss for s in results if s.label == r.label) for r in results}
        least = [r for r in least if medians[r.label] == min(medians[s.label] for s in least)]
        assert winner(results) is least[0]
    assert winner([]) is None
    assert winner([Found("a", math.inf)]) == Found("a", math.inf)


def additive(name: str, scale: float = 1.0) -> FunctionProblem:
    """The loss is the number of the units that are kept, scaled."""
    space = CompressionSpace([Unit(f"u{i}", (0, 1)) for i in range(4)], 3)
    return FunctionProblem(space, lambda levels: scale * sum(levels), name)


def planned(problem: str, searcher: str, seed: int, *, fixed: bool = False) -> PlannedSearch:
    """A search of the name that a plan would give it."""
    name = f"{problem}-{searcher}-s{seed}"
    return PlannedSearch(name, problem, searcher, searcher, {}, seed, f"journals/{name}.jsonl", fixed)


def started(folder: Path, *problems: FunctionProblem, searchers: tuple[str, ...] = ("random",)) -> Comparison:
    """A comparison whose searches have all ended, two seeds each."""
    searches = [planned(p.name, s, seed) for p, s, seed in itertools.product(problems, searchers, (0, 1))]
    plan = {"name": folder.name, "problems": [{"name": p.name} for p in problems], "budget": {"evaluations": 6}}
    comparison = Comparison.start(folder, plan, searches, "name = 'text'\n")
    for problem in problems:
        comparison = comparison.with_problem(ProblemRecord.of(problem.name, problem))
    for entry, problem in ((e, p) for e in searches for p in problems if p.name == e.problem):
        header = search_header(entry.id, entry.searcher, problem, Budget(evaluations=6), seed=entry.seed)
        with Journal.open(folder / entry.journal, header) as journal:
            searcher = make_searcher(entry.searcher, problem.space, seed=entry.seed)
            search(searcher, problem, budget=Budget(evaluations=6), journal=journal, checkpoints=(1.0,))
    return comparison


def test_what_was_recorded_is_read_again(tmp_path: Path) -> None:
    comparison = started(tmp_path, additive("one"), additive("two", 0.1))
    read = Comparison.read(tmp_path)
    assert replace(read, problems={}) == replace(comparison, problems={})
    assert list(read.problems) == ["one", "two"]
    assert json.dumps(read.problems["two"].to_json()) == json.dumps(comparison.problems["two"].to_json())
    assert read.plan_text == "name = 'text'\n"
    assert [r.search for r in read.records()] == [s.id for s in read.searches]
    (tmp_path / read.searches[0].journal).unlink()
    (tmp_path / read.searches[1].journal).write_text("not a journal\n")
    reasons = [found for _, found in read.journals() if isinstance(found, str)]
    assert reasons[0] == "not started"
    assert "no header" in reasons[1]
    with pytest.raises(PlanError, match=r"not a comparison's folder: it has no comparison\.json"):
        Comparison.read(tmp_path / "journals")


def test_each_problem_has_a_winner_of_its_own(tmp_path: Path) -> None:
    comparison = started(tmp_path, additive("one"), additive("two", 0.1))
    comparison.write_profiles()
    profiles = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "profiles").iterdir()}
    assert {p.name for p in comparison.winner_files()} == {"winner-one.json", "winner-two.json"}
    for key, found in comparison.winning_profiles().items():
        rivals = [p for name, p in profiles.items() if name.startswith(f"{key}-")]
        assert len(rivals) == 2
        assert found["held_out"]["loss"] == min(p["held_out"]["loss"] for p in rivals)
        assert found in rivals
    assert list(comparison.winning_profiles()) == ["one", "two"]


def test_whether_a_searcher_is_deterministic_is_read_and_not_asked(tmp_path: Path) -> None:
    searches = [planned("p", "gone:elsewhere", 0, fixed=True), *(planned("p", "random", s) for s in (0, 1))]
    Comparison.start(tmp_path, {}, [*searches, planned("p", "optuna:tpe", 0)])
    assert [s.deterministic for s in Comparison.read(tmp_path).searches] == [True, False, False, False]
    path = tmp_path / "comparison.json"
    data = json.loads(path.read_text())
    for entry in data["searches"]:
        del entry["deterministic"]  # as recorded before: one seed where others have several
    path.write_text(json.dumps(data))
    assert [s.deterministic for s in Comparison.read(tmp_path).searches] == [True, False, False, True]


def test_another_plan_and_another_problem_are_refused(tmp_path: Path) -> None:
    comparison = started(tmp_path, additive("one"))
    comparison.refuse_other_plan({**comparison.plan, "workers": 7, "description": "other"})
    with pytest.raises(JournalError, match=r"budget: was \{'evaluations': 6\}, is \{'evaluations': 7\}"):
        comparison.refuse_other_plan({**comparison.plan, "budget": {"evaluations": 7}})
    with pytest.raises(JournalError, match="problems: now has"):
        comparison.refuse_other_plan({**comparison.plan, "problems": [{"name": "one"}, {"name": "two"}]})
    same = ProblemRecord.of("one", additive("one"))
    assert comparison.with_problem(same).problems["one"] == same
    with pytest.raises(JournalError, match=r"not the one this comparison started with \(data: was absent, is 7\)"):
        comparison.with_problem(replace(same, fingerprint={**same.fingerprint, "data": 7}))


@pytest.mark.parametrize("text", ["{", "[]", '{"searches": [{}]}', '{"searches": [{"id": "a", "problem": "p"}]}'])
def test_a_damaged_record_is_said_to_be_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(
        PlanError, match=r"comparison\.json cannot be read .*: give the folder of a comparison"
    ) as caught:
        Comparison.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_changes_are_told_in_a_line() -> None:
    old: dict[str, Any] = {"a": 1, "b": {"c": [1, 2], "d": {}}, "e": "x" * 500}
    assert flat(old) == {"a": 1, "b/c": [1, 2], "b/d": {}, "e": "x" * 500}
    found = changes(flat(old), flat({"b": {"c": [2, 1], "d": {}}, "e": 3, "f": None}))
    text = told(found)
    assert text.startswith("a: was 1, is absent; b/c: has another order; e: was 'xxx")
    assert "(502 characters), is 3; f: was absent, is None" in text
    assert told({str(i): (0, i) for i in range(1, 9)}).endswith("; and 2 more")
    assert changes({"a": 1}, {"a": 2}, ignore=("a",)) == {}
