"""Latency tables: from fake programs whose times are known, and from llama.cpp and torch on tiny models."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers

from evo_hpo.cli.commands import main
from evo_hpo.errors import InvalidSettingError, MissingPackageError
from evo_hpo.export import llama_cpp_timing
from evo_hpo.export.ggml_kernels import Kernel, any_blocks
from evo_hpo.export.latency import RUNS, layers_of, measured, random_profiles, references
from evo_hpo.export.llama_cpp import forget
from evo_hpo.export.llama_cpp_timing import SPAN, Decoding, LlamaCppProgram
from evo_hpo.export.torch_timing import TorchProgram, _Bits4, _Bits8
from evo_hpo.levels.ggml import dequantize
from evo_hpo.levels.level_set import Choice, LevelSet
from evo_hpo.levels.manifest import LevelRecord, UnitRecord
from evo_hpo.scoring.expected_levels import Unbuilt, expected_levels
from evo_hpo.scoring.latency_table import LatencyTable
from evo_hpo.scoring.task import LanguageModelTask
from evo_hpo.space.amounts import milliseconds
from evo_hpo.space.compression_space import Assignment
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two blocks with rows of 64."""
    config = transformers.LlamaConfig(
        vocab_size=280,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    return str(save_tiny(tmp_path_factory.mktemp("model"), config))


def made(shapes: Sequence[tuple[int, int]], kinds: Sequence[str] = ("Q4_0", "Q5_0", "Q8_0")) -> LevelSet:
    rows = []
    for number, shape in enumerate(shapes):
        size = math.prod(shape)
        records = tuple(
            LevelRecord(kind, (bits + 4) * size, size, 1, (bits + 4) * size, 0.1, {"kind": "ggml", "type": kind})
            for bits, kind in enumerate(kinds)
        )
        unit = UnitRecord(name := f"model.layers.{number}.mlp.up_proj", (name,), shape, size, False, records)
        rows.append((name, [[Choice(Unbuilt(), unit, record)] for record in records]))
    return LevelSet(rows, "bits")


class _Fake:
    """A program whose times are known; now and then something else runs, and whole models may hold a surprise."""

    name, version = "fake", "1"

    def __init__(self, rest: float, surprise: float = 0.0) -> None:
        self.rest, self.surprise = rest, surprise
        self.rng = np.random.default_rng(0)

    def time(self, choice: Choice) -> float:
        return math.prod(choice.unit.shape) * (2.0 + ("Q4_0", "Q8_0", "Q5_0").index(choice.level.label))

    @contextlib.contextmanager
    def product(self, choice: Choice, read: int) -> Iterator[_Fake.Runs]:
        yield _Fake.Runs(self, self.time(choice))

    @contextlib.contextmanager
    def model(self, levels: LevelSet, assignment: Assignment, depth: int) -> Iterator[_Fake.Runs]:
        own = sum(map(self.time, levels.chosen(assignment).values()))
        uneven = len(set(assignment)) > 1
        yield _Fake.Runs(self, (self.rest + own) * (1 + self.surprise * uneven))

    class Runs:
        def __init__(self, program: _Fake, time: float) -> None:
            self.program, self.time = program, time

        def nanoseconds(self) -> float:
            return self.time * (1 + 3 * (self.program.rng.random() < 0.5))


def test_times_that_are_known_are_found_among_disturbed_ones(model: str) -> None:
    levels = made([(32, 64), (64, 64), (32, 64)])
    found = measured(_Fake(5000), model, levels, machine="here", depth=0, rounds=30)
    assert found.rest == 5000
    assert found.times == {
        (rows, columns, label): round(rows * columns * speed)
        for rows, columns in ((32, 64), (64, 64))
        for label, speed in (("Q4_0", 2.0), ("Q5_0", 4.0), ("Q8_0", 3.0))
    }
    assert [row["measured"] for row in found.checked["references"]] == [5000 + 8192 * speed for speed in (2, 4, 3)]
    assert all(row["predicted"] == row["measured"] for row in found.checked["references"])
    assert len(found.checked["profiles"]) == 10
    assert found.checked["mean_error"] < 1e-3
    assert found.checked["rank_correlation"] > 0.99


def test_the_first_run_of_a_turn_does_not_count_and_a_rest_below_nothing_is_refused(model: str) -> None:
    """It finds what the last one left in the cache: here it takes no time."""

    class Cached(_Fake):
        @contextlib.contextmanager
        def product(self, choice: Choice, read: int) -> Iterator[Any]:
            yield Cached.Turns(self.time(choice))

        @contextlib.contextmanager
        def model(self, levels: LevelSet, assignment: Assignment, depth: int) -> Iterator[Any]:
            yield Cached.Turns(self.rest + sum(map(self.time, levels.chosen(assignment).values())))

        class Turns:
            def __init__(self, time: float) -> None:
                self.time, self.runs = time, 0

            def nanoseconds(self) -> float:
                self.runs += 1
                return self.time if self.runs % RUNS != 1 else 0.0

    found = measured(Cached(5000), model, made([(32, 64)] * 2), machine="here", rounds=2)
    assert (found.rest, found.times[32, 64, "Q4_0"]) == (5000, 4096)
    with pytest.raises(InvalidSettingError, match="longer than whole models: .* more than rounds=1"):
        measured(Cached(-5000), model, made([(32, 64)] * 2), machine="here", rounds=1)


def test_tokens_are_timed_one_after_the_other() -> None:
    """Each reads one more than the one before, until a span is full."""
    program = Mock()
    program.nanoseconds.return_value = 1
    decoding = Decoding(program, 7)
    for _ in range(SPAN + 3):
        decoding.nanoseconds()
    assert [call.args[0] for call in program.nanoseconds.call_args_list] == [*range(7, 7 + SPAN + 1), 7, 8]


def test_one_type_alone_has_its_rest_and_no_error(model: str) -> None:
    found = measured(_Fake(5000), model, made([(32, 64)] * 3, ["Q4_0"]), machine="here", depth=0, rounds=30, profiles=2)
    assert (found.rest, found.times) == (5000, {(32, 64, "Q4_0"): 4096})
    assert (found.checked["largest_error"], found.checked["rank_correlation"]) == (0, 0)


def test_the_error_of_whole_models_that_are_no_sums_is_stated(model: str) -> None:
    levels = made([(32, 64), (64, 64), (32, 64)] * 4)
    found = measured(_Fake(5000, surprise=0.25), model, levels, machine="here", depth=0, rounds=30, profiles=4)
    assert found.checked["mean_error"] == pytest.approx(1 - 1 / 1.25, abs=1e-3)
    assert found.checked["largest_error"] == pytest.approx(1 - 1 / 1.25, abs=1e-3)


def test_random_profiles_reach_from_the_cheapest_to_the_dearest() -> None:
    levels = made([(32, 64)] * 40)
    means = [float(np.mean(profile)) for profile in random_profiles(levels, 10)]
    assert np.all(np.diff(means) > -0.2)
    assert means[0] < 0.3
    assert means[-1] > 1.7
    assert references(levels) == [(k,) * 40 for k in range(3)]


def test_experts_and_numbers_out_of_range_are_refused(model: str) -> None:
    levels = made([(32, 64)])
    renamed = LevelSet([("layers.0.experts.1.up_proj", rows) for _, rows in levels.rows()], "bits")
    with pytest.raises(InvalidSettingError, match="experts is not measured"):
        layers_of(renamed)
    with pytest.raises(InvalidSettingError, match="profiles=1"):
        measured(_Fake(1), model, levels, machine="here", profiles=1)


@pytest.mark.parametrize("kind", ["Q4_0", "IQ4_NL", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "F16"])
def test_what_is_timed_is_the_product_of_the_matrix(kind: str) -> None:
    with Kernel((96, 256), kind, read=1 << 20) as kernel:
        assert kernel.nanoseconds() > 0
        weights = dequantize(torch.from_numpy(any_blocks(96, 256, kind)), kind).numpy()
        expected = weights @ kernel.vector
        assert np.square(kernel.outputs() - expected).sum() < 1e-3 * np.square(expected).sum()
        assert kernel.copies * any_blocks(96, 256, kind).nbytes >= 1 << 20


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="Linux is asked to forget")
def test_a_file_that_is_forgotten_is_whole_and_no_longer_in_memory(pytestconfig: pytest.Config) -> None:
    """On a disk, where there is one: temporary folders may lie in memory, which a file that the test drops shows."""

    def held(path: Path) -> int:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
            start, told = np.frombuffer(pages, dtype=np.uint8), np.zeros(len(pages) // mmap.PAGESIZE, dtype=np.uint8)
            asked = [ctypes.c_void_p(start.ctypes.data), ctypes.c_size_t(len(pages)), ctypes.c_void_p(told.ctypes.data)]
            assert ctypes.CDLL(None).mincore(*asked) == 0
            del start
            return int((told & 1).sum())

    with tempfile.TemporaryDirectory(dir=pytestconfig.rootpath) as folder:
        path, other = Path(folder) / "file", Path(folder) / "other"
        for each in (path, other):
            each.write_bytes(data := os.urandom(1 << 20))
        with other.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        path.write_bytes(data)
        before = held(path)
        forget(path)
        assert (before, held(path)) == ((1 << 20) // mmap.PAGESIZE, held(other))
        assert path.read_bytes() == data


def test_torch_products_have_the_shape_of_the_layer() -> None:
    inputs = torch.randn(1, 3, 64).to(torch.bfloat16)
    eight, four = _Bits8(32, 64), _Bits4(32, 64)
    expected = (inputs.float() @ eight.weight.float().T) * eight.scale.float()
    assert torch.allclose(eight(inputs).float(), expected, rtol=0.02, atol=0.02)
    assert four(inputs).shape == (1, 3, 32)


def task(model: str, **changes: Any) -> LanguageModelTask:
    own: dict[str, Any] = {"method": "ggml", "levels": ("Q4_0", "Q8_0"), "average": 6.0, **changes}
    return LanguageModelTask(model, **own)


def test_llama_cpp_is_measured_on_files_of_the_levels(model: str) -> None:
    levels = expected_levels(task(model))
    program = LlamaCppProgram(model)
    found = measured(program, model, levels, machine="here", depth=4, rounds=2, profiles=2)
    shapes = {(64, 64), (32, 64), (128, 64), (64, 128)}
    assert set(found.times) == {(*shape, label) for shape in shapes for label in ("Q4_0", "Q8_0")}
    assert min(found.times.values()) > 0
    assert found.version.startswith("of xllamacpp 20")


def test_without_the_extra_llama_cpp_is_not_timed(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp_timing, "version", Mock(side_effect=PackageNotFoundError))
    with pytest.raises(MissingPackageError, match=r"pip install 'evo-hpo\[gguf\]'"):
        LlamaCppProgram(model)


def test_torch_is_measured_and_leaves_the_model_as_it_was(model: str) -> None:
    levels = expected_levels(task(model, method="rtn", levels=(2, 4, 8), build={"group_size": 32}))
    program = TorchProgram(model)
    ids = torch.arange(5)[None]
    before = program._model(ids).logits
    found = measured(program, model, levels.with_dropped(), machine="here", depth=4, rounds=2, profiles=2)
    assert {label for *_, label in found.times} == {"2", "4", "8"}, "what is dropped takes no time"
    assert torch.equal(program._model(ids).logits, before)


def test_llama_cpp_says_which_levels_it_does_not_run(model: str) -> None:
    levels = expected_levels(task(model, method="rtn", levels=(4,), build={"group_size": 32}))
    with pytest.raises(InvalidSettingError, match="llama.cpp runs no level 4"):
        measured(LlamaCppProgram(model), model, levels, machine="here", profiles=2)


def test_from_a_plan_to_a_table_to_a_space(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("plan.toml").write_text(
        f"""
        name = "quick"
        seeds = [0]
        budget = {{ tokens = 64 }}
        [[problems]]
        name = "language_model"
        [problems.settings]
        model = "{model}"
        method = "ggml"
        levels = ["Q4_0", "Q8_0"]
        latency = "1 s"
        latency_table = "t.json"
        [[searchers]]
        name = "uniform"
        """
    )
    words = ["latency", "plan.toml", "t.json", "--machine", "mine", "--rounds", "1", "--profiles", "2", "--depth", "4"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "microseconds a token, mine, llama.cpp of xllamacpp" in said
    assert "after 4 others; the 2 models that tell it are " in said
    assert "2 whole models of random levels: rank correlation" in said
    assert json.loads(Path("t.json").read_text())["machine"] == "mine"
    own = task(model, average=None, latency="1 s", latency_table="t.json")
    space = own.space(expected_levels(own))
    table = LatencyTable.read("t.json")
    assert space.budgets[1] == 10**9 - table.rest
    counts = (((64, 64), 2), ((32, 64), 2), ((128, 64), 2), ((64, 128), 1))
    assert space.costs(space.lowest)[1] == 2 * sum(n * table.times[*shape, "Q4_0"] for shape, n in counts)
    ends = [
        table.rest + 2 * sum(n * end(table.times[*shape, label] for label in ("Q4_0", "Q8_0")) for shape, n in counts)
        for end in (min, max)
    ]
    assert f'latency = "{sum(ends) / 2e6:.4g} ms" and latency_table = "t.json"' in said
    assert f"{milliseconds(ends[0])} to {milliseconds(ends[1])} a token" in said
    for wrong, told in (
        (words, "must be a new file"),
        ([*words[:2], "u.json", "--program", "vllm"], "measured are"),
        ([*words[:2], "/proc/x/u.json"], "choose another place"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2
        assert told in " ".join(capsys.readouterr().err.split())
