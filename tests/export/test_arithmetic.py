"""A search with llama.cpp's arithmetic, from its plan to the file: figures are llama.cpp's own."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.export.evaluation import evaluate
from evo_hpo.export.folder import export_profile
from evo_hpo.export.gguf_file import export_gguf, write_gguf
from evo_hpo.levels.drop import build_drop_store
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import LoadedModel, load_model
from evo_hpo.models.text import token_stream
from evo_hpo.search.registry import make_problem, problem_factory
from tests.export.gguf_models import SIZES, byte_level_tokenizer, made
from tests.export.test_gguf import losses


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, tuple[int, ...]]:
    """Of a model whose embedding is Q6_K in the file it is read from; the file, its problem, its assignment."""
    folder = tmp_path_factory.mktemp("arithmetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVO_HPO_CACHE", str(folder / "cache"))
        fast = byte_level_tokenizer("smollm")
        dense = made(transformers.LlamaConfig(**SIZES | {"vocab_size": len(fast)}))
        dense = LoadedModel(dense.model, fast, dense.identity, dense.name)
        build_drop_store(dense, folder / "none", kinds=("block",))
        kept = open_store(folder / "none").levels
        write_gguf(folder / "q.gguf", dense, kept, [1] * len(kept.units), types={"output.weight": "Q6_K"})
        settings: dict[str, Any] = {"model": str(folder / "q.gguf"), "method": "ggml", "arithmetic": "llama.cpp"}
        settings |= {"levels": ["Q4_K", "Q4_0"], "average": 4.5, "store": str(folder / "store"), "dtype": "float32"}
        settings |= {"build": {"calibration_tokens": 64, "sequence_length": 32}, "sequence_length": 32}
        settings |= {"calibration_tokens": 64, "held_out_tokens": 1024, "tokens": 32}
        task: Any = problem_factory("language_model")
        task.prepare(settings, lambda done, total, what: None)
        problem: Any = make_problem("language_model", **settings)
        units, levels = problem.space.units, tuple(number % 2 for number in range(len(problem.space.units)))
        data = {
            "problem": {"name": "language_model", "settings": settings},
            "held_out": problem.validate(levels),
            "fingerprint": problem.fingerprint(),
            "average": problem.space.average(levels),
            "levels": levels,
            "units": {unit.name: unit.levels[k] for unit, k in zip(units, levels, strict=True)},
        }
        (folder / "p.json").write_text(json.dumps(data))
        return folder / "p.json", problem, levels


def test_the_search_says_what_llama_cpp_computes(
    profile: tuple[Path, Any, tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL and perplexity to 0.5 %, and the export compares them; with the head that the file has."""
    path, problem, levels = profile
    assert problem.evaluator.inputs.at(levels)["lm_head"] == "Q8_K"
    exported = export_gguf(path, tmp_path / "m.gguf")
    assert "nats a token on the held-out text, the search found" in exported.checked
    card = (tmp_path / "m.gguf.md").read_text()
    assert exported.checked in card
    assert "held-out figures in float32 with llama.cpp's arithmetic" in card
    assert "`llama-quantize --tensor-type-file`, which makes blocks of its own" in card
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    text = problem.held_out
    wanted = problem.validate(levels)
    divergence, loss = losses(tmp_path / "m.gguf", problem.evaluator.model, text)
    assert divergence == pytest.approx(wanted["loss"], rel=0.005)
    assert math.exp(loss) == pytest.approx(wanted["perplexity"], rel=0.005)
    other = json.loads(path.read_text())
    other["held_out"]["loss"] *= 1.2
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ModelError, match="llama.cpp has a KL of .* --no-check"):
        export_gguf(tmp_path / "other.json", tmp_path / "n.gguf")
    assert not (tmp_path / "n.gguf").exists()
    export_gguf(tmp_path / "other.json", tmp_path / "n.gguf", check=False)


def test_the_final_evaluation_has_the_arithmetic_of_the_plan(
    profile: tuple[Path, Any, tuple[int, ...]], tmp_path: Path
) -> None:
    """Of profiles and files alike; the file and the profile that it was made from have one figure."""
    path, problem, levels = profile
    export_gguf(path, tmp_path / "m.gguf", check=False)
    specs = [str(path), str(tmp_path / "m.gguf")]
    table = evaluate(specs, ["pydoc"], sequence_length=32, tokens=256)
    assert table.protocol["arithmetic"] == "llama.cpp"
    (_, first, second) = (row.texts["pydoc"] for row in table.results)
    assert first.perplexity.mean == pytest.approx(second.perplexity.mean, rel=1e-5)
    assert first.kl is not None
    assert second.kl is not None
    assert first.kl.mean == pytest.approx(second.kl.mean, rel=1e-4)
    stream = token_stream("pydoc", load_model(str(tmp_path / "m.gguf")).tokenizer, "held_out", 256)
    text = torch.from_numpy(np.asarray(stream[:256], dtype=np.int64)).view(8, 32)
    expected = problem.evaluator.evaluate_held_out(levels, text)
    assert first.kl.mean == pytest.approx(expected["loss"], rel=1e-4)
    settings: Any = {"original": table.protocol["original"], "sequence_length": 32, "tokens": 256}
    plain = evaluate(specs[1:], ["pydoc"], **settings)
    assert plain.protocol["arithmetic"] == ""
    assert (told := plain.results[1].texts["pydoc"].kl) is not None
    assert told.mean != pytest.approx(first.kl.mean, rel=1e-5)
    asked = evaluate(specs[1:], ["pydoc"], arithmetic="llama.cpp", **settings)
    assert asked.results[1].texts["pydoc"] == second
    with pytest.raises(InvalidSettingError, match="arithmetic='cuda' must be 'llama.cpp'"):
        evaluate(specs, ["pydoc"], arithmetic="cuda")


def test_a_folder_is_checked_with_the_arithmetic_of_the_search(
    profile: tuple[Path, Any, tuple[int, ...]], tmp_path: Path
) -> None:
    """Whose dense weights differ by rounding of inputs alone."""
    path, *_ = profile
    told = export_profile(path, tmp_path / "folder", "float32")["checked"]
    found, wanted = map(float, re.findall(r"[0-9.]+(?= nats)|(?<=found )[0-9.]+", told))
    assert found == pytest.approx(wanted, rel=1e-3)
