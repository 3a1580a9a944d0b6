"""Budgets of milliseconds a token, and of bytes on each part, beside bits or bytes: against counting by hand."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evo_hpo.errors import EvoHpoError, InfeasibleError, InvalidSettingError
from evo_hpo.levels.level_set import Choice, LevelSet
from evo_hpo.levels.manifest import LevelRecord, UnitRecord
from evo_hpo.scoring.expected_levels import Unbuilt
from evo_hpo.scoring.footprint import ModelShape, configuration
from evo_hpo.scoring.latency_table import LatencyTable, agreement, sizes_of
from evo_hpo.scoring.limits import Limits, least_within
from evo_hpo.scoring.spaces import budgeted
from evo_hpo.search.budget import Budget
from evo_hpo.search.loop import search
from evo_hpo.search.registry import make_problem, make_searcher, prepare_problem, preview_problem
from evo_hpo.space.amounts import milliseconds, nanoseconds
from evo_hpo.space.compression_space import CompressionSpace, Unit
from tests.scoring.test_task import plan_of, rehearse_and_prepare, settings
from tests.tiny import save_tiny

SHAPES = {"self_attn.q_proj": (32, 32), "mlp.up_proj": (64, 32)}
TIMES = {(32, 32, "2"): 50, (32, 32, "3"): 80, (32, 32, "4"): 60, (64, 32, "2"): 100, (64, 32, "3"): 170}
TIMES |= {(64, 32, "4"): 110}
REST = 1000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


def levels() -> LevelSet:
    """Two layers of each of two blocks, at 2, 3 and 4 bits; GGUF blocks, so that bytes are bits / 8."""
    rows = []
    for block, (role, shape) in itertools.product(range(2), SHAPES.items()):
        size = math.prod(shape)
        records = tuple(LevelRecord(str(b), b * size, size, 1, b * size, 0.1, {"kind": "ggml"}) for b in (2, 3, 4))
        unit = UnitRecord(name := f"model.layers.{block}.{role}", (name,), shape, size, False, records)
        rows.append((name, [[Choice(Unbuilt(), unit, record)] for record in records]))
    return LevelSet(rows, "bits")


def table(of: str, **changes: Any) -> LatencyTable:
    sizes = sizes_of(ModelShape.of(configuration(of)))
    own = {"machine": "here", "program": "a program", "version": "1", "threads": 1, "depth": 0, "model": sizes}
    return LatencyTable(**{**own, "rest": REST, "times": TIMES, **changes})


def written(folder: Path, found: LatencyTable) -> str:
    path = folder / "table.json"
    path.write_text(found.text())
    return str(path)


def space(
    model: str, *, average: Any = None, latency: str = "", table: str = "", parts: Mapping[str, Any] | None = None
) -> CompressionSpace:
    return budgeted(model, levels(), average, "", {}, Limits.of(latency, table, parts or {}))


def time_of(assignment: Sequence[int]) -> int:
    shapes = list(SHAPES.values()) * 2
    return REST + sum(TIMES[*shape, "234"[level]] for shape, level in zip(shapes, assignment, strict=True))


def bits_of(assignment: Sequence[int]) -> int:
    sizes = [math.prod(shape) for shape in SHAPES.values()] * 2
    return sum((level + 2) * size for level, size in zip(assignment, sizes, strict=True))


EVERYTHING = list(itertools.product(range(3), repeat=4))
WEIGHTS = 2 * (32 * 32 + 64 * 32)


@pytest.mark.parametrize("latency", ["1380 ns", "1.35 us", "0.0014 ms"])
@pytest.mark.parametrize("average", [None, 2.5, 3.5])
def test_what_is_feasible_keeps_both_budgets(model: str, tmp_path: Path, latency: str, average: float | None) -> None:
    found = space(model, average=average, latency=latency, table=written(tmp_path, table(model)))
    most = {"1380 ns": 1380, "1.35 us": 1350, "0.0014 ms": 1400}[latency]
    bits = (average or 4) * WEIGHTS
    expected = [a for a in EVERYTHING if time_of(a) <= most and bits_of(a) <= bits]
    assert list(found.enumerate()) == expected
    assert found.uniform() in expected
    assert found.resources[0] == "bits"
    assert found.costs(expected[0]) == (bits_of(expected[0]), time_of(expected[0]) - REST)


def test_a_dropped_layer_takes_no_time_and_tied_layers_take_theirs_together(model: str, tmp_path: Path) -> None:
    tied = levels().with_dropped().tied({"whole": r"(.*)\.\w+\.\w+_proj$"})
    limits = Limits.of("1400 ns", written(tmp_path, table(model)), {})
    found = budgeted(model, tied, None, "", {}, limits)
    assert [unit.levels for unit in found.units] == [("dropped", "2", "3", "4")] * 2
    assert [row[1] for row in found.vectors[0]] == [0, 150, 250, 170]


@pytest.mark.parametrize("ends", [(2.0, 4.0), (2.5, 3.5)])
def test_a_range_of_bits_keeps_the_latency_too(model: str, tmp_path: Path, ends: tuple[float, float]) -> None:
    average = {"from": ends[0], "to": ends[1]}
    found = space(model, average=average, latency="1380 ns", table=written(tmp_path, table(model)))
    assert found.ranged
    assert {time_of(a) <= 1380 for a in found.enumerate()} == {True}
    assert found.budgets == (int(ends[1] * WEIGHTS), 380)


def test_blocks_on_a_part_keep_its_bytes(model: str) -> None:
    parts = {"gpu": {"blocks": [0, 0], "size": "1000 B"}, "ram": {"blocks": [1, 1], "size": "1.2 kB"}}
    found = space(model, parts=parts)
    sizes = [math.prod(shape) for shape in SHAPES.values()]

    def on(part: Sequence[int]) -> int:
        return sum((level + 2) * size // 8 for level, size in zip(part, sizes, strict=True))

    assert list(found.enumerate()) == [a for a in EVERYTHING if on(a[:2]) <= 1000 and on(a[2:]) <= 1200]
    assert found.resources == ("bits", "bytes of gpu", "bytes of ram")


def test_what_is_out_of_reach_is_told_with_what_is_not(model: str, tmp_path: Path) -> None:
    told = r"the levels take 0.0013 ms to 0.0015 ms a token \(here, a program 1, 1 thread\), 0.001 ms of it attention"
    with pytest.raises(InfeasibleError, match=told):
        space(model, latency="1 us", table=written(tmp_path, table(model)))
    with pytest.raises(InfeasibleError, match=r"parts.gpu: size='700 B' is below what .* at least, 0.000768 MB"):
        space(model, parts={"gpu": {"blocks": [0, 0], "size": "700 B"}})


def test_budgets_that_exclude_each_other_are_told_apart(model: str, tmp_path: Path) -> None:
    slow = {key: 1000 - 100 * int(key[2]) for key in TIMES}  # more bits are faster
    path = written(tmp_path, table(model, times=slow))
    with pytest.raises(InfeasibleError, match="the least that was found is 3200 nanoseconds a token .* is 3000: raise"):
        space(model, average=2.0, latency="4000 ns", table=path)
    assert space(model, average=4.0, latency="4000 ns", table=path).uniform() == (2, 2, 2, 2)


def test_the_least_within_a_budget_is_nearly_that_of_all_assignments() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = rng.integers(1, 50, (6, 3))
        bits = np.sort(rng.integers(1, 50, (6, 3)), axis=1)
        units = [[(int(c),) for c in row] for row in bits]
        budget = int(bits[:, 0].sum() + rng.integers(0, 60))
        made = CompressionSpace([Unit(f"m{i}", tuple(c[0] for c in row)) for i, row in enumerate(units)], budget)
        best = min(sum(costs[i][k] for i, k in enumerate(a)) for a in made.enumerate())
        assert best <= least_within(made, costs.tolist()) <= best + 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": {k: v for k, v in TIMES.items() if k[2] != "3"}}, "no time of a 32x32 layer at 3, only levels 2, 4"),
        ({"times": {(9, 9, "2"): 1}}, "no time of a 32x32 layer at 2, only layers of 9x9"),
        ({"model": {"blocks": 30, "hidden": 576, "vocabulary": 49152, "key_values": 1}}, "another model .30 blocks of"),
    ],
)
def test_a_table_of_something_else_is_refused(model: str, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        space(model, latency="1400 ns", table=written(tmp_path, table(model, **changes)))


def test_a_table_is_read_as_it_was_written_or_refused(model: str, tmp_path: Path) -> None:
    found = table(model, checked={"mean_error": 0.02})
    assert LatencyTable.read(written(tmp_path, found)) == found
    with pytest.raises(InvalidSettingError, match="cannot be read .*evo-hpo latency"):
        LatencyTable.read(tmp_path / "none.json")
    good = json.loads(found.text())
    wrong: list[dict[str, Any]] = [{"format": 9}, {"rest": -1}, {"rest": "5"}, {"threads": "4"}, {"model": [1]}]
    wrong += [{"model": {}}, {"checked": 3}, {"layers": [{"shape": [1, 2], "level": "4", "ns": -3}]}]
    for text in ("no JSON", "[]", *(json.dumps(good | change) for change in wrong)):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InvalidSettingError, match="is no table of this version"):
            LatencyTable.read(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("12 ms", "", {}), "need each other"),
        (("", "t.json", {}), "need each other"),
        (("12", "t.json", {}), "a time above 0 with its unit"),
        (("0 ms", "t.json", {}), "a time above 0"),
        (("", "", {"gpu": "60 MB"}), "parts.gpu='60 MB' must be"),
        (("", "", {"gpu": {"blocks": [3, 1], "size": "1 MB"}}), r"blocks=\[3, 1\] must be \[first, last\]"),
        (("", "", {"gpu": {"blocks": [0, 1], "size": "3 bits a weight"}}), "must be a size above 0"),
        (
            ("", "", {"a": {"blocks": [0, 3], "size": "1 MB"}, "b": {"blocks": [3, 4], "size": "1 MB"}}),
            "block 3 is on the parts 'a' and 'b'",
        ),
    ],
)
def test_limits_that_make_no_sense_are_refused(arguments: tuple[str, str, Any], message: str) -> None:
    with pytest.raises(EvoHpoError, match=message):
        Limits.of(*arguments)


def test_a_part_of_blocks_that_are_not_is_refused(model: str) -> None:
    with pytest.raises(InvalidSettingError, match="must end at 1, the model's last"):
        space(model, parts={"gpu": {"blocks": [0, 5], "size": "1 MB"}})


def test_times_are_read_as_people_write_them() -> None:
    texts = ("12 ms", "0.5 s", "700us", "3.5 ns", "80 tokens/s")
    assert [nanoseconds(text) for text in texts] == [12_000_000, 500_000_000, 700_000, 3, 12_500_000]
    assert milliseconds(12_345_678) == "12.35 ms"


def test_agreement_is_that_of_ranks_and_sizes() -> None:
    found = agreement([11, 18, 33], [10, 20, 30])
    assert found == {"rank_correlation": 1.0, "mean_error": 0.1, "largest_error": 0.1}
    assert agreement([1, 3, 2], [1, 2, 3])["rank_correlation"] == 0.5


def test_a_search_keeps_bits_and_milliseconds(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a plan's settings to every trial of three searchers, on a model with GPTQ levels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    shapes = [(32, 32), (16, 32), (64, 32), (32, 64)]
    times = {(*s, b): math.prod(s) + 100 * (b == "3") for s in shapes for b in "234"}
    path = written(tmp_path, table(model, times=times))
    own = settings(Path(model), tmp_path / "store", average=3.5, latency="0.0198 ms", latency_table=path)
    own |= {"sequence_length": 8, "calibration_tokens": 64, "held_out_tokens": 16, "tokens": 8}
    preview = preview_problem("language_model", own)
    assert len(preview.space.budgets) == 2, "searchers are tried on as many resources before anything is built"
    with pytest.raises(InvalidSettingError, match="cannot be read"):
        prepare_problem("language_model", {**own, "latency_table": "none.json"}, lambda *_: None)
    assert not (tmp_path / "store").exists(), "a table that is missing is told before the levels are built"
    rehearse_and_prepare(own, plan_of(own, budget={"tokens": 256}))
    problem = make_problem("language_model", **own)
    assert problem.space.budgets[1] == 19_800 - REST
    for name in ("uniform", "evopress", "fisher"):
        searcher = make_searcher(name, problem.space, seed=0)
        found = search(searcher, problem, budget=Budget(tokens=512))
        assert found.outcomes
        for outcome in found.outcomes:
            assert problem.space.feasible(outcome.trial.levels)
            chosen = zip(problem.space.units, outcome.trial.levels, strict=True)
            assert REST + sum(unit.size + 100 * (unit.levels[level] == "3") for unit, level in chosen) <= 19_800
