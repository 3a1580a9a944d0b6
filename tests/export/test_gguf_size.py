"""Bytes and times that are told of GGUF files, against files that are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from evo_hpo.cli.commands import main
from evo_hpo.export.evaluation import evaluate
from evo_hpo.export.folder import read_profile
from evo_hpo.export.gguf_file import write_gguf
from evo_hpo.export.gguf_size import size_in_file
from evo_hpo.export.latency import layers_of, references
from evo_hpo.levels.drop import build_drop_store
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import LoadedModel, load_model
from evo_hpo.scoring.expected_levels import expected_levels
from evo_hpo.scoring.latency_table import LatencyTable
from evo_hpo.scoring.task import language_model
from evo_hpo.space.amounts import shown
from tests.export.gguf_models import MODELS, SIZES, Blocks, byte_level_tokenizer, levels_of, made
from tests.export.test_found_elsewhere import profile_of
from tests.tiny import random_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))


def counted(model: str, levels: LevelSet, assignment: list[int]) -> int:
    own = levels.counted_in("bytes")
    labels = {unit.name: unit.levels[level] for unit, level in zip(levels.units, assignment, strict=True)}
    space = own.space(budget=10**12)
    return size_in_file(model, levels).rest + space.cost(space.from_labels(labels))


def saved(name: str, folder: Path) -> LoadedModel:
    fast = byte_level_tokenizer("qwen2")
    config = MODELS[name]()
    config.vocab_size = len(fast)
    random_model(config).save_pretrained(folder)  # type: ignore[operator]
    fast.save_pretrained(folder)
    return load_model(str(folder))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("include", [".", r"self_attn\.[qk]_proj|embed"])
def test_without_a_template_the_bytes_of_the_file_are_known_before_it_is_written(
    name: str, include: str, tmp_path: Path
) -> None:
    loaded = saved(name, tmp_path / "model")
    levels = Blocks(loaded, ["Q4_0", "Q8_0"], include).levels
    assignment = [0] * len(levels.units)
    told = counted(loaded.name, levels, assignment)
    assert write_gguf(tmp_path / "m.gguf", loaded, levels, assignment) == told
    assert (tmp_path / "m.gguf").stat().st_size == told


@pytest.fixture
def f16(tmp_path: Path) -> Path:
    """A GGUF file of a tiny Llama in half precision."""
    fast = byte_level_tokenizer("smollm")
    dense = made(transformers.LlamaConfig(**SIZES | {"vocab_size": len(fast)}))
    dense = LoadedModel(dense.model, fast, dense.identity, dense.name)
    build_drop_store(dense, tmp_path / "none", kinds=("block",))
    kept = open_store(tmp_path / "none").levels
    write_gguf(tmp_path / "f16.gguf", dense, kept, [1] * len(kept.units))
    return tmp_path / "f16.gguf"


def without_v(levels: LevelSet) -> LevelSet:
    return LevelSet([row for row in levels.rows() if "v_proj" not in row[0]], "bits")


@pytest.mark.parametrize("change", [without_v, LevelSet.with_dropped])
def test_with_a_template_too_where_layers_are_left_out_or_dropped(
    change: Callable[[LevelSet], LevelSet], f16: Path, tmp_path: Path
) -> None:
    loaded = load_model(str(f16))
    levels = change(levels_of(loaded, ["Q4_K", "Q8_0"], tmp_path / "store"))
    assignment = [number % len(unit.levels) for number, unit in enumerate(levels.units)]
    told = counted(str(f16), levels, assignment)
    assert write_gguf(tmp_path / "m.gguf", loaded, levels, assignment, template=f16) == told


def test_a_profile_of_ggml_types_is_evaluated_beside_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, _ = profile_of(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    sizes = ["sizes", str(profile), "--sequences", "3", "--context", "1000"]
    for words in (["export", str(profile), str(tmp_path / "m.gguf")], sizes):
        with pytest.raises(SystemExit, match="0"):
            main(words)
    size, cache = (tmp_path / "m.gguf").stat().st_size, 3 * 1000 * 2 * (2 * 2 * 64)  # keys and values, 2 heads of 64
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│ ggml"))
    assert row.split("│")[2].strip() == shown(size)
    assert row.split("│")[5].strip() == shown(size + cache)
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and the dog did not. " * 40)
    text = f"whole:{tmp_path / 'text.txt'}"
    specs = [str(profile), str(tmp_path / "m.gguf")]
    rows = evaluate(specs, [text], sequence_length=16, tokens=64).results
    assert rows[1].bytes == rows[2].bytes == (tmp_path / "m.gguf").stat().st_size
    again = evaluate(specs[1:], [text], original=specs[1], sequence_length=16, tokens=64).results
    assert again[0].bytes == rows[2].bytes, "an original that is a file is as large as that"


def test_layers_that_are_dropped_take_the_time_of_the_zeros_that_llama_cpp_multiplies(f16: Path) -> None:
    settings = {"model": str(f16), "method": "ggml", "levels": ["Q4_K", "Q8_0"], "dropped": True, "average": 6.0}
    levels = expected_levels(language_model.task(settings))
    times = layers_of(levels, "llama.cpp")
    assert {label for *_, label in times} == {"dropped", "Q4_K", "Q8_0"}
    assert {label for *_, label in layers_of(levels, "torch")} == {"Q4_K", "Q8_0"}
    assert references(levels) == [(1,) * len(levels.units), (2,) * len(levels.units)]
    assert references(levels.select(labels=["dropped", "Q8_0"])) == [(1,) * len(levels.units)] * 2
    model = {"blocks": 2, "hidden": 256, "vocabulary": 1, "key_values": 1}
    table = LatencyTable("here", "llama.cpp", "1", 1, 0, model, 10, dict.fromkeys(times, 3))
    everything_gone = (0,) * len(levels.units)
    assert table.total(levels, everything_gone) == 10 + 3 * len(levels.units)
    assert replace(table, program="torch").total(levels, everything_gone) == 10


def test_evaluation_knows_every_model_before_it_measures_one_and_keeps_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, _ = profile_of(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and the dog did not. " * 40)
    model, text = str(tmp_path / "model"), f"whole:{tmp_path / 'text.txt'}"
    seen: list[str] = []
    with pytest.raises(Exception, match="nothing-here"):
        evaluate([model, str(tmp_path / "nothing-here.gguf")], [text], progress=seen.append)
    with pytest.raises(Exception, match="missing"):
        evaluate([model], [text, f"whole:{tmp_path / 'missing.txt'}"], sequence_length=16, tokens=64)
    assert not seen
    (other := tmp_path / "other").mkdir()
    (other / "config.json").write_text("{}")  # there, and damaged
    words = ["evaluate", str(profile), str(other), "--text", text, "--sequence-length", "16", "--tokens", "64"]
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--output", str(tmp_path / "out"), "--no-track"])
    assert [row["name"] for row in json.loads((tmp_path / "out/evaluation.json").read_text())["results"]] == [
        "original",
        "ggml",
    ]
    assert "cannot load" in " ".join(capsys.readouterr().err.split())


def test_a_profile_needs_no_latency_table_to_be_read(tmp_path: Path) -> None:
    profile, _ = profile_of(tmp_path)
    (assignment,) = {tuple(read_profile(profile, None)[3])}
    data = json.loads(profile.read_text())
    data["problem"]["settings"] |= {"latency": "1 ns", "latency_table": "gone.json"}
    profile.write_text(json.dumps(data))
    assert read_profile(profile, None)[3] == assignment
