"""Comparisons end to end on a synthetic problem: workers, resume, failures, profiles."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from evo_hpo.errors import JournalError, MissingPackageError, PlanError
from evo_hpo.record.comparison import Comparison
from evo_hpo.record.journal import read_journal, read_journals
from evo_hpo.record.profiles import open_profile
from evo_hpo.run import schedule
from evo_hpo.run.events import (
    BatchScored,
    CheckpointTaken,
    Event,
    ProblemLoading,
    ProblemMade,
    SearchEnded,
    SearchFailed,
    SearchStarted,
)
from evo_hpo.run.plan import make_plan
from evo_hpo.run.schedule import ComparisonFailed, compare, comparison_folder, process_count
from evo_hpo.search.problem import FunctionProblem
from evo_hpo.search.registry import make_problem
from evo_hpo.space.compression_space import CompressionSpace
from tests.run.test_plan import plan_data


def trials(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """What every search asked and got, without times."""
    return {
        r.search: [(o.trial.number, o.trial.levels, o.loss, o.tokens, o.minibatch, o.trial.parent) for o in r.outcomes]
        for r in read_journals(folder)
    }


@pytest.mark.parametrize(("device", "expected"), [("cpu", 3), ("cuda", 1), ("cuda:1", 1)])
def test_a_gpu_is_shared_by_several_searches_only_where_the_plan_says_so(
    device: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evo_hpo.run.schedule.cores", lambda: 3)
    data = plan_data(problems=[{"name": "smollm2", "settings": {"device": device}}])
    assert process_count(make_plan(data), tasks=8) == (expected, 3 // expected)
    assert process_count(make_plan({**data, "workers": 2}), tasks=8)[0] == 2
    assert process_count(make_plan(plan_data()), tasks=8) == (3, 1)


def test_one_and_two_workers_give_identical_results(tmp_path: Path) -> None:
    one = compare(make_plan(plan_data(workers=1)), root=tmp_path / "one")
    two = compare(make_plan(plan_data(workers=2)), root=tmp_path / "two")
    assert trials(one) == trials(two)
    assert set(trials(one)) == {"uniform-s0", "evopress-s0", "evopress-s1"}
    record = json.loads((one / "comparison.json").read_text())
    assert record["problems"]["additive"]["space"]["units"]
    winner, levels = open_profile(one / "profiles" / "winner.json")
    space = CompressionSpace.from_json(record["problems"]["additive"]["space"])
    assert space.feasible(levels)
    assert space.from_labels(winner["units"]) == levels
    finals = [json.loads(p.read_text())["held_out"]["loss"] for p in (one / "profiles").glob("*-s?.json")]
    assert winner["held_out"]["loss"] == min(finals)


def test_a_killed_comparison_resumes_to_the_same_trials(tmp_path: Path) -> None:
    data = plan_data(budget={"evaluations": 3000}, seeds=[0], workers=1, name="killed")
    data["problems"] = [{"name": "interacting", "settings": {"units": 40}}]
    whole = compare(make_plan(data), root=tmp_path / "whole")
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(data))
    script = (  # as users write them: searches must not run it again
        "import json, sys; from pathlib import Path; from evo_hpo.run.schedule import compare\n"
        "from evo_hpo.run.plan import make_plan\n"
        "compare(make_plan(json.load(open(sys.argv[1]))), root=Path(sys.argv[2]))\n"
    )
    (tmp_path / "run.py").write_text(script)
    arguments = [sys.executable, str(tmp_path / "run.py"), str(plan), str(tmp_path / "cut")]
    process = subprocess.Popen(arguments, start_new_session=True)
    journal = tmp_path / "cut" / "killed" / "journals" / "evopress-s0.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size > 30_000):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    partial = trials(tmp_path / "cut" / "killed").get("evopress-s0", [])
    assert 0 < len(partial) < 3000
    resumed = compare(make_plan(data), root=tmp_path / "cut", resume=True)
    assert trials(resumed) == trials(whole)


def test_without_ray_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'evo-hpo\[ray\]'"):
        compare(make_plan(plan_data()), root=tmp_path, ray="local")
    assert not list(tmp_path.iterdir())


def test_a_finished_comparison_is_never_overwritten_and_a_changed_plan_not_resumed(tmp_path: Path) -> None:
    plan = make_plan(plan_data(seeds=[0], budget={"evaluations": 10}))
    first = compare(plan, root=tmp_path)
    assert comparison_folder(plan, tmp_path, resume=False) != first
    assert comparison_folder(plan, tmp_path, resume=True) == first
    with pytest.raises(JournalError, match=r"budget: was .*10.* is .*20"):
        comparison_folder(make_plan(plan_data(seeds=[0], budget={"evaluations": 20})), tmp_path, resume=True)
    with pytest.raises(PlanError, match="nothing to resume"):
        comparison_folder(make_plan(plan_data(name="other")), tmp_path, resume=True)


def test_resuming_a_finished_comparison_scores_nothing_again(tmp_path: Path) -> None:
    plan = make_plan(plan_data(seeds=[0]))
    folder = compare(plan, root=tmp_path)
    before = {p.name: p.read_bytes() for p in (folder / "journals").iterdir()}
    compare(plan, root=tmp_path, resume=True)
    assert {p.name: p.read_bytes() for p in (folder / "journals").iterdir()} == before


def test_events_tell_the_whole_story_of_each_search(tmp_path: Path) -> None:
    heard: list[Event] = []
    plan = make_plan(plan_data(seeds=[0], workers=1))
    folder = compare(plan, root=tmp_path, listener=heard.append)
    assert [type(e) for e in heard[:3]] == [ProblemLoading, ProblemMade, SearchStarted]
    for record in read_journals(folder):
        own = [e for e in heard if getattr(e, "search", "") == record.search]
        batches = [e for e in own if isinstance(e, BatchScored)]
        assert isinstance(own[0], SearchStarted)
        assert isinstance(own[-1], SearchEnded)
        assert len(batches) == len(record.batches)
        assert batches[-1].trials == len(record.outcomes) == batches[-1].spent
        assert min(b.loss for b in batches if b.loss is not None) == min(o.loss for o in record.outcomes)
        taken = [e.held_out for e in own if isinstance(e, CheckpointTaken)]
        assert taken == [c.held_out for c in record.checkpoints]


def test_what_comes_from_a_journal_is_told_as_that(tmp_path: Path) -> None:
    plan = make_plan(plan_data(seeds=[0], workers=1))
    path = compare(plan, root=tmp_path) / "journals" / "evopress-s0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    whole = [i for i, line in enumerate(lines, start=1) if '"more"' not in line and '"outcome"' in line]
    path.write_text("".join(lines[: whole[len(whole) // 2]]))
    kept = len(read_journal(path).batches)
    heard: list[Event] = []
    compare(plan, root=tmp_path, resume=True, listener=heard.append)
    told = [e.replayed for e in heard if isinstance(e, BatchScored) and e.search == "evopress-s0"]
    assert 0 < kept < len(told)
    assert told == [True] * kept + [False] * (len(told) - kept)


def test_what_is_recorded_says_which_searchers_ignore_their_seed(tmp_path: Path) -> None:
    folder = compare(make_plan(plan_data(workers=1)), root=tmp_path)
    found = {s.id: s.deterministic for s in Comparison.read(folder).searches}
    assert found == {"uniform-s0": True, "evopress-s0": False, "evopress-s1": False}


def test_a_search_that_fails_leaves_its_trace_and_the_others_their_profiles(tmp_path: Path) -> None:
    plan = make_plan(plan_data(seeds=[0], workers=1))
    damaged = tmp_path / "small" / "journals" / "evopress-s0.jsonl"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("no journal\nat all\n")
    heard: list[Event] = []
    with pytest.raises(ComparisonFailed, match="evopress-s0"):
        compare(plan, folder=tmp_path / "small", listener=heard.append)
    assert [e.search for e in heard if isinstance(e, SearchFailed)] == ["evopress-s0"]
    assert {p.name for p in (tmp_path / "small" / "profiles").iterdir()} == {"uniform-s0.json", "winner.json"}


def test_each_seed_searches_its_own_instance_also_after_resuming(tmp_path: Path) -> None:
    problem = {"name": "interacting", "settings": {"units": 9}, "instance": "seed"}
    plan = make_plan(plan_data(problems=[problem], budget={"evaluations": 12}))
    folder = compare(plan, root=tmp_path)
    first = trials(folder)
    assert trials(compare(plan, root=tmp_path, resume=True)) == first
    for search, found in first.items():
        made = make_problem("interacting", units=9, seed=int(search[-1]))
        assert isinstance(made, FunctionProblem)
        assert [loss for _, _, loss, *_ in found] == [made.function(levels) for _, levels, *_ in found]
    assert Comparison.read(folder).problems["interacting"].instances.keys() == {"0", "1"}
    profile, _ = open_profile(folder / "profiles" / "evopress-s1.json")
    assert profile["problem"]["settings"] == {"units": 9, "seed": 1}
    assert not list(folder.glob("profiles/winner*"))  # losses of two instances cannot be compared
