"""Profiles that were found with a GPU, taken away where there is none, and for programs that read other formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from evo_hpo.errors import PlanError
from evo_hpo.export.evaluation import evaluate
from evo_hpo.export.folder import export_profile
from evo_hpo.export.gguf_file import export_gguf
from evo_hpo.files import write_whole
from evo_hpo.search.registry import make_problem, problem_factory
from tests.export.gguf_models import SIZES, byte_level_tokenizer
from tests.tiny import random_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))


def profile_of(folder: Path, **choices: Any) -> tuple[Path, Any]:
    """A profile of a tiny Llama in a folder, levels by turns, and its problem."""
    if not (folder / "model").exists():
        config = transformers.LlamaConfig(**SIZES | {"vocab_size": 400, "num_hidden_layers": 1})
        random_model(config, spread=0.08).save_pretrained(folder / "model")  # type: ignore[operator]
        byte_level_tokenizer("qwen2").save_pretrained(folder / "model")
    settings: dict[str, Any] = {"model": str(folder / "model"), "method": "ggml", "levels": ["Q4_K", "Q8_0"]}
    settings |= {"build": {"calibration_tokens": 64, "sequence_length": 32}, "average": 6.5, "dtype": "float32"}
    settings |= {"sequence_length": 16, "calibration_tokens": 64, "held_out_tokens": 32, "tokens": 16, **choices}
    settings["store"] = str(folder / f"store-{settings['method']}")
    factory: Any = problem_factory("language_model")
    factory.prepare(settings, lambda *_: None)
    problem: Any = make_problem("language_model", **settings)
    levels = [number % len(unit.levels) for number, unit in enumerate(problem.space.units)]
    profile = {
        "problem": {"name": "language_model", "settings": settings},
        "held_out": problem.validate(tuple(levels)),
        "average": problem.space.average(levels),
        "fingerprint": problem.fingerprint(),
        "levels": levels,
        "units": problem.space.labels(levels),
    }
    problem.evaluator.close()
    path = folder / f"{settings['method']}.json"
    path.write_text(json.dumps(profile))
    return path, problem


def test_what_was_found_with_a_gpu_is_exported_and_evaluated_without_one(tmp_path: Path) -> None:
    packed = {"method": "rtn", "levels": [4, 8], "build": {"group_size": 32, "symmetric": True}, "average": 5.0}
    for choices in ({}, packed):
        profile, _ = profile_of(tmp_path, **choices)
        data = json.loads(profile.read_text())
        data["problem"]["settings"]["device"] = "cuda"
        profile.write_text(json.dumps(data))
    export_profile(tmp_path / "rtn.json", tmp_path / "dense")
    export_profile(tmp_path / "rtn.json", tmp_path / "packed", format="compressed-tensors")
    assert export_gguf(tmp_path / "ggml.json", tmp_path / "m.gguf").checked
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and the dog did not. " * 40)
    text = f"whole:{tmp_path / 'text.txt'}"
    specs = [str(tmp_path / name) for name in ("rtn.json", "dense")]
    rows = evaluate(specs, [text], sequence_length=16, tokens=64, dtype=torch.float32).results[1:]
    assert rows[0].texts[text].perplexity.mean == pytest.approx(rows[1].texts[text].perplexity.mean, rel=1e-4)


def test_what_was_searched_for_llama_cpp_is_no_folder_of_packed_weights(tmp_path: Path) -> None:
    profile, _ = profile_of(tmp_path, serve="llama.cpp")
    with pytest.raises(PlanError, match=r"searched for llama.cpp, which loads no packed weights: name a FILE.gguf"):
        export_profile(profile, tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_files_beside_a_gguf_file_are_not_written_over_nor_left_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, _ = profile_of(tmp_path)
    for beside in ("m.gguf.md", "m.gguf.tensor-types.txt"):
        (tmp_path / beside).write_text("mine")
        with pytest.raises(PlanError, match=f"{beside} exists already"):
            export_gguf(profile, tmp_path / "m.gguf")
        assert (tmp_path / beside).read_text() == "mine"
        (tmp_path / beside).unlink()

    def full(path: Path, text: str) -> Path:
        if path.suffix == ".md":
            raise OSError(28, "No space left on device")
        return write_whole(path, text)

    monkeypatch.setattr("evo_hpo.export.gguf_file.write_whole", full)
    with pytest.raises(OSError, match="No space"):
        export_gguf(profile, tmp_path / "new" / "m.gguf")
    assert not (tmp_path / "new").exists()
