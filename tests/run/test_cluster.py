"""Searches whose batches are scored on a Ray cluster: two nodes on this machine, some of which die."""

from __future__ import annotations

import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evo_hpo.errors import ScorersError
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.quantizers import RTN
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import LoadedModel
from evo_hpo.models.paths import cache_folder
from evo_hpo.run import scorers
from evo_hpo.run.events import BatchScored, Event, ScorersUp
from evo_hpo.run.node_stores import bring, stock_here
from evo_hpo.run.plan import Plan, make_plan
from evo_hpo.run.schedule import ComparisonFailed, compare
from evo_hpo.run.scorers import Scorers, connect, disconnect
from evo_hpo.run.spread_problem import SpreadProblem
from evo_hpo.scoring.language_model_problem import LanguageModelProblem
from evo_hpo.search.budget import Budget
from evo_hpo.search.loop import search
from evo_hpo.search.problem import Minibatch, Problem
from evo_hpo.search.registry import make_problem, make_searcher
from evo_hpo.space.compression_space import CompressionSpace, Unit
from tests.levels.test_store import read_whole
from tests.run.test_compare import trials
from tests.run.test_plan import plan_data
from tests.scoring.evaluators import LENGTH, make_evaluator
from tests.tiny import RoundedLevels, tiny_model, tiny_tokens

STORE = 80_000_000  # bytes of a node's object store
SOON = {
    "health_check_initial_delay_ms": 300,
    "health_check_period_ms": 300,
}  # a dead node is missed sooner


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    """Of the head, and of the other nodes."""
    return tmp_path_factory.mktemp("head"), tmp_path_factory.mktemp("node")


def node(cache: Path) -> dict[str, Any]:
    """Of two cores, with a cache of its own."""
    return {"num_cpus": 2, "object_store_memory": STORE, "env_vars": {"EVO_HPO_CACHE": str(cache)}}


def lose_node(cluster: Any) -> None:
    """At once: a node is given a second to leave, which one without its head does not."""
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)


@pytest.fixture(scope="module")
def cluster(caches: Sequence[Path]) -> Iterator[Any]:
    """A head and a node of two cores each, and none of Ray's processes that searches do not need."""
    head = {**node(caches[0]), "include_log_monitor": False, "no_monitor": True, "_system_config": SOON}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray._private.node.Node.start_api_server", lambda *_, **__: None)  # of the dashboard
        patch.setenv("RAY_raylet_start_wait_time_s", "120")  # of half a minute, which a busy machine may take
        made = Cluster(initialize_head=True, head_node_args=head)
        made.add_node(**node(caches[1]))
        yield made
        while made.worker_nodes:
            lose_node(made)
        made.shutdown()


def plan(**changes: Any) -> Plan:
    """Uniform and EvoPress on a problem with a fidelity, long enough to be disturbed."""
    data = plan_data(budget={"tokens": 400_000}, seeds=[0], workers=1)
    data["problems"] = [{"name": "noisy", "settings": {"units": 20}}]
    return make_plan(data | changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The trials of the plan in a process of this machine."""
    return trials(compare(plan(), root=tmp_path_factory.mktemp("alone")))


def scorers_of(cluster: Any) -> list[psutil.Process]:
    """The processes of its scorers; tests beside these may have a cluster of their own."""

    def command(process: psutil.Process | None) -> str:
        try:
            return " ".join(process.cmdline()) if process else ""
        except psutil.Error:
            return ""

    found = [p for p in psutil.process_iter() if "ray::Scorer" in command(p)]
    return [p for p in found if cluster.address in command(p.parent())]


def disturbed(disturbances: dict[int, Callable[[], object]], heard: list[Event]) -> Callable[[Event], None]:
    """A listener that does something after so many batches."""

    def listen(event: Event) -> None:
        heard.append(event)
        if isinstance(event, BatchScored):
            disturbances.get(sum(isinstance(e, BatchScored) for e in heard), bool)()

    return listen


def wait_until(reached: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and not reached():
        time.sleep(0.01)


def test_a_scorer_and_a_node_that_die_change_no_trial(cluster: Any, alone: dict[str, Any], tmp_path: Path) -> None:
    heard: list[Event] = []
    lost = disturbed({3: lambda: scorers_of(cluster)[0].kill(), 9: lambda: lose_node(cluster)}, heard)
    assert trials(compare(plan(), root=tmp_path, ray=cluster.address, listener=lost)) == alone
    assert ScorersUp(4) in heard
    assert sum(isinstance(e, BatchScored) for e in heard) > 50  # much is scored after both


def test_a_driver_that_is_killed_is_resumed_to_the_same_trials_also_when_a_node_comes_back(
    cluster: Any, caches: Sequence[Path], alone: dict[str, Any], tmp_path: Path
) -> None:
    if cluster.worker_nodes:
        lose_node(cluster)
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys; from pathlib import Path\n"
        "from evo_hpo.run.plan import make_plan\n"
        "from evo_hpo.run.schedule import compare\n"
        "if __name__ == '__main__':\n"
        "    compare(make_plan(json.loads(sys.argv[3])), root=Path(sys.argv[1]), ray=sys.argv[2])\n"
    )
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [sys.executable, str(script), str(tmp_path / "runs"), cluster.address, json.dumps(plan().plain())]
    process = subprocess.Popen(arguments, env=here, start_new_session=True)
    journal = tmp_path / "runs" / plan().name / "journals" / "evopress-s0.jsonl"
    wait_until(lambda: journal.exists() and journal.stat().st_size > 20_000)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert journal.stat().st_size > 20_000
    wait_until(lambda: not scorers_of(cluster))  # Ray ends those of the killed driver
    heard: list[Event] = []
    back = disturbed({3: lambda: cluster.add_node(**node(caches[1]))}, heard)
    assert trials(compare(plan(), root=tmp_path / "runs", ray=cluster.address, resume=True, listener=back)) == alone
    assert ScorersUp(2) in heard


def test_nodes_that_lack_a_package_or_have_another_version_are_told(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("from evo_hpo.run import scorers\nclass Scorer(scorers.Scorer): pass\n")
    connect(cluster.address)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(scorers, "version", lambda name: "0.0.1")
            with pytest.raises(ScorersError, match=rf"node {platform.node()} has evo-hpo .* \(here 0.0.1\), torch"):
                Scorers(1)
            patch.syspath_prepend(str(tmp_path))
            patch.setattr(scorers, "Scorer", importlib.import_module("only_here").Scorer)
            with pytest.raises(
                ScorersError, match=r"no scorer can start on node .*'only_here'.*install evo-hpo\[ray\]"
            ):
                Scorers(1)
    finally:
        disconnect()


def test_a_node_that_lacks_the_drivers_store_copies_it(cluster: Any, caches: Sequence[Path], tmp_path: Path) -> None:
    """It has a cache of its own."""
    if not cluster.worker_nodes:
        cluster.add_node(**node(caches[1]))
    build_store(LoadedModel.from_model(tiny_model("llama")), tmp_path, RTN([2, 3], group_size=16))
    connect(cluster.address)
    try:
        stock, here = stock_here(), ray.get_runtime_context().get_node_id()

        def work() -> str:
            bring([folder := cache_folder() / "stores" / "s"], stock, [str(tmp_path)])
            return str(folder)

        other = next(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != here)
        there = NodeAffinitySchedulingStrategy(other, soft=False)
        made = ray.get(ray.remote(work).options(scheduling_strategy=there).remote())
    finally:
        disconnect()
    assert made == str(caches[1] / "stores" / "s")
    read_whole(open_store(made))
    assert open_store(made).fingerprint == open_store(tmp_path).fingerprint


def test_a_head_that_dies_is_told_and_resumed_also_without_it(
    cluster: Any, alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends the cluster, so it is the last test on it."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "1")  # a minute, if nothing is said
    heard: list[Event] = []
    dies = disturbed({3: lambda: cluster.remove_node(cluster.head_node, allow_graceful=False)}, heard)
    with pytest.raises(ComparisonFailed, match=r"is Ray's head gone\?.*is in the journals; start Ray again and resume"):
        compare(plan(), root=tmp_path, ray=cluster.address, listener=dies)
    assert len([e for e in heard if isinstance(e, BatchScored)]) < 100
    assert trials(compare(plan(), root=tmp_path, resume=True)) == alone


def test_an_address_without_a_cluster_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ComparisonFailed, match="no Ray cluster at '127.0.0.1:1'"):
        compare(plan(), root=tmp_path, ray="127.0.0.1:1")


class Here:
    """Answers in this process, as so many scorers would; each has a problem of its own."""

    def __init__(self, make: Callable[[], Problem], count: int) -> None:
        self.problems = [make() for _ in range(count)]
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.problems)

    def ask(self, name: str, settings: dict[str, Any], questions: Sequence[Sequence[Any]]) -> list[list[Any]]:
        self.asked.append(len(questions))
        answers = []
        for i, calls in enumerate(questions):
            problem = self.problems[i % len(self.problems)]
            found = [(getattr(problem, name), args, named) for name, args, named in calls]
            answers.append([f(*args, **named) if callable(f) else f for f, args, named in found])
        return answers


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_a_search_on_a_model_gives_the_same_trials_over_any_number_of_scorers(count: int) -> None:
    """With nested minibatches, and candidates that are stopped early: what is charged is the same too."""
    model = tiny_model("llama")

    def make() -> LanguageModelProblem:
        evaluator = make_evaluator((model, levels := RoundedLevels(model)))
        units = [Unit(u.name, costs=(1, 2, 3), size=1) for u in levels.units]
        space = CompressionSpace(units, 2 * len(units))
        rows = tiny_tokens(length=LENGTH)
        held_out = {"docs": rows[:2], "prose": rows[2:4]}
        return LanguageModelProblem(evaluator, space, held_out, tokens=LENGTH, name="tiny")

    def run(problem: Problem) -> list[Any]:
        settings = {"offspring": 6, "survivors": [3, 1], "tokens": [2 * LENGTH, 6 * LENGTH]}
        searcher = make_searcher("evopress", problem.space, seed=1, **settings)
        found = search(searcher, problem, budget=Budget(tokens=60 * LENGTH), seed=3, checkpoints=[1.0])
        trials = [(o.trial, o.loss, o.tokens, o.status) for o in found.outcomes]
        return [trials, found.checkpoints[0].held_out, problem.texts]

    expected = run(make())
    assert any(status == "stopped" for *_, status in expected[0])
    assert run(SpreadProblem(Here(make, count), "tiny", {})) == expected


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_search_gives_the_same_trials_over_any_number_of_scorers(count: int) -> None:
    def run(problem: Problem) -> list[Any]:
        searcher = make_searcher("evopress", problem.space, seed=1, offspring=8, survivors=[3, 1], tokens=[64, 256])
        found = search(searcher, problem, budget=Budget(tokens=20_000), seed=3, checkpoints=[1.0])
        return [[(o.trial, o.loss, o.tokens, o.minibatch) for o in found.outcomes], found.checkpoints[0].held_out]

    def make() -> Problem:
        return make_problem("noisy", units=12)

    here = Here(make, count)
    assert run(SpreadProblem(here, "noisy", {})) == run(make())
    assert max(here.asked) == count


def test_no_scorer_is_an_error() -> None:
    class Nobody:
        def __len__(self) -> int:
            return 0

        def ask(self, *_: Any) -> list[list[Any]]:
            raise ScorersError("no scorer came up")

    with pytest.raises(ScorersError):
        SpreadProblem(Nobody(), "noisy", {}).score([], Minibatch(0, 64))


class Devices:
    """Those of a stand-in for Ray, where scorers are up at once; what each scorer asked for."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self.asked: list[dict[str, Any]] = []

    def options(self, **given: Any) -> MagicMock:
        self.asked.append(given)
        return MagicMock()

    def free(self) -> dict[str, float]:
        taken = {kind: sum(given.get(f"num_{kind.lower()}s", 0) for given in self.asked) for kind in self.total}
        return {kind: count - taken[kind] for kind, count in self.total.items()}


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    found, stand_in = Devices(), MagicMock()
    stand_in.cluster_resources.side_effect = lambda: found.total
    stand_in.available_resources.side_effect = found.free
    stand_in.remote.return_value.options = found.options
    stand_in.wait.side_effect = lambda answers, **_: (answers, [])
    stand_in.get.return_value = ("node", dict.fromkeys(scorers.VERSIONS, "1"))
    monkeypatch.setattr(scorers, "version", lambda _: "1")
    monkeypatch.setattr(scorers, "ray", stand_in)
    return found


@pytest.mark.parametrize(("gpus", "expected"), [(1, 8), (3, 2)])
def test_a_model_on_several_gpus_gets_scorers_with_as_many(gpus: int, expected: int, devices: Devices) -> None:
    """What remains of three each stays idle."""
    devices.total = {"GPU": 8.0, "CPU": 2.0}
    assert len(Scorers(gpus=gpus)) == expected
    assert [given["num_gpus"] for given in devices.asked] == [gpus] * expected


def test_a_node_that_comes_back_is_used(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    devices.total = {"CPU": 1.0}
    found = Scorers()
    assert len(found) == 1
    devices.total = {"CPU": 3.0}
    found.ask("noisy", {"units": 5}, [[]])
    assert len(found) == 1  # it is not looked for at every batch
    monkeypatch.setattr(scorers, "LOOK_AGAIN", 0.0)
    found.ask("noisy", {"units": 5}, [[]])
    assert len(found) == 3
