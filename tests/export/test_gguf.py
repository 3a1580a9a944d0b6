"""GGUF files of tiny models, run by llama.cpp: its outputs are those of the dequantized model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from torch import nn

from evo_hpo.cli.commands import main
from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.export.gguf_check import difference
from evo_hpo.export.gguf_file import export_gguf, write_gguf
from evo_hpo.export.llama_cpp import LlamaCpp
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.drop import build_drop_store
from evo_hpo.levels.ggml import GGML_TYPES
from evo_hpo.levels.quantizers import GPTQ
from evo_hpo.levels.store import open_store
from evo_hpo.models.experts import unfuse_experts
from evo_hpo.models.loading import LoadedModel
from evo_hpo.scoring.arithmetic import InputRounding, InputTypes, file_types
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.file_size import FileSize
from evo_hpo.search.registry import make_problem, problem_factory
from tests.export.gguf_models import (
    MODELS,
    SIZES,
    SLOW,
    Blocks,
    bits,
    byte_level_tokenizer,
    compressed,
    distance,
    levels_of,
    made,
)
from tests.tiny import random_model, tiny_tokens


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_the_dequantized_model_does(name: str, tmp_path: Path) -> None:
    loaded = made(MODELS[name]())
    levels = levels_of(loaded, ["Q2_K", "Q6_K", "Q8_0", "F16"], tmp_path / "store")
    roles = list(dict.fromkeys(unit.role for unit in levels.units))
    mixed = [roles.index(unit.role) % 4 for unit in levels.units]
    sizes, costs = [], []
    for what, assignment, bound in (("mixed", mixed, 3e-3), ("f16", [3] * len(levels.units), 1e-5)):
        path = tmp_path / f"{what}.gguf"
        sizes.append(write_gguf(path, loaded, levels, assignment))
        costs.append(bits(levels, assignment))
        assert path.stat().st_size == sizes[-1]
        model = compressed(loaded, levels, assignment)
        assert distance(path, model.model) < bound < 0.1 * distance(path, made(MODELS[name]()).model) or what == "f16"
        assert difference(path, model) < 1e-2
    assert 8 * (sizes[1] - sizes[0]) == costs[1] - costs[0], "the budget counts the file's bits"


@pytest.mark.parametrize("name", MODELS)
def test_every_type_in_one_file(name: str, tmp_path: Path) -> None:
    """Logits are those of the dequantized model, KL and perplexity the evaluator's, to 1 %."""
    small = MODELS[name]()
    loaded = made(type(small)(**small.to_dict() | {"num_hidden_layers": 4, "layer_types": None}))
    first = list(MODELS).index(name)
    levels = Blocks(loaded, GGML_TYPES[first:] + GGML_TYPES[:first]).levels
    assignment = [0] * len(levels.units)
    write_gguf(tmp_path / "m.gguf", loaded, levels, assignment)
    held = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert set(GGML_TYPES) <= set(held.values())
    model = compressed(loaded, levels, assignment).model
    apart = distance(tmp_path / "m.gguf", model)
    assert apart < 5e-3 < 0.02 * distance(tmp_path / "m.gguf", loaded.model)
    unfuse_experts(model)
    inputs = InputTypes.of(None, loaded.model, levels)
    assert file_types(tmp_path / "m.gguf", loaded.model).items() <= inputs.at(assignment).items()
    InputRounding(model, inputs.at(assignment))
    assert distance(tmp_path / "m.gguf", model) < min(3e-3, 0.8 * apart)  # a sum in another order may round otherwise
    text = tiny_tokens(4, 32, seed=3)
    divergence, loss = losses(tmp_path / "m.gguf", loaded.model, text)
    for each, bound in ((None, 0.01), (inputs, 0.003)):
        evaluator = Evaluator(loaded.model, levels, text, threads=1, inputs=each)
        expected = evaluator.evaluate_held_out(tuple(assignment), text)
        assert divergence == pytest.approx(expected["loss"], rel=bound)
        assert math.exp(loss) == pytest.approx(expected["perplexity"], rel=0.01)


def losses(path: Path, dense: nn.Module, text: torch.Tensor) -> tuple[float, float]:
    """Mean KL from a model to llama.cpp with a file, and mean cross-entropy there, nats a token."""
    found = []
    with LlamaCpp(path) as program, torch.inference_mode():
        for ids in text:
            log_q = torch.log_softmax(torch.from_numpy(program.logits(ids.tolist()))[:-1], -1)
            log_p = torch.log_softmax(dense(input_ids=ids[None]).logits[0, :-1], -1)
            entropy = -log_q.gather(1, ids[1:, None])[:, 0]
            found.append(torch.stack([(log_p.exp() * (log_p - log_q)).sum(-1), entropy]).mean(1))
    divergence, loss = torch.stack(found).mean(0).tolist()
    return divergence, loss


def test_embedding_and_head_may_have_every_type(tmp_path: Path) -> None:
    loaded = made(transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1}))
    for kind in GGML_TYPES:
        levels = Blocks(loaded, [kind], "embed|head").levels
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, loaded, levels, [0, 0])
        held = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
        assert {held["token_embd.weight"], held["output.weight"]} == {kind}
        assert distance(path, compressed(loaded, levels, [0, 0]).model) < 1e-3


def test_every_type_is_read_by_llama_cpp(tmp_path: Path) -> None:
    loaded = made(transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1}))
    types = [name for name in GGML_TYPES if name not in SLOW]
    levels = levels_of(loaded, types, tmp_path / "store")
    other = {"token_embd.weight": "Q6_K", "output.weight": "Q8_0"}
    seen = set[str]()
    for turn in range(0, len(types), len(levels.units)):
        mixed = [(turn + number) % len(types) for number in range(len(levels.units))]
        path = tmp_path / f"{turn}.gguf"
        write_gguf(path, loaded, levels, mixed, types=other)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        held = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
        assert other.items() <= held.items()
        model = compressed(loaded, levels, mixed).model
        for module, name in (("model.embed_tokens", "token_embd.weight"), ("lm_head", "output.weight")):
            weight = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
            model.get_submodule(module).weight.data = torch.from_numpy(weight)
        assert distance(path, model) < 3e-3
        lines = path.with_name(f"{path.name}.tensor-types.txt").read_text().split()
        patterns = [(re.compile(pattern), kind) for pattern, kind in (line.split("=") for line in lines)]
        first = {name: next((kind for pattern, kind in patterns if pattern.search(name)), "f32") for name in held}
        assert first == {name: kind.lower() for name, kind in held.items()}  # llama-quantize takes the first found
        seen |= set(held.values())
    assert set(types) <= seen


def test_llama_cpp_goes_on_with_a_text_as_the_model_does(tmp_path: Path) -> None:
    """Greedily, one token after the other."""
    loaded = made(transformers.LlamaConfig(**SIZES))
    build_drop_store(loaded, tmp_path / "none", kinds=("block",))
    kept = open_store(tmp_path / "none").levels
    write_gguf(tmp_path / "m.gguf", loaded, kept, [1] * len(kept.units))
    model: Any = loaded.model
    prompt = tiny_tokens(1, 12, seed=3)
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0].tolist()
    written = prompt[0].tolist()
    with LlamaCpp(tmp_path / "m.gguf") as program:
        while len(written) < len(expected):
            written.append(int(program.logits(written)[-1].argmax()))
    assert written == expected


def test_levels_that_are_no_ggml_types_are_written_as_they_decode(tmp_path: Path) -> None:
    loaded = made(MODELS["llama"]())
    build_store(loaded, tmp_path / "store", GPTQ([3], group_size=64), tiny_tokens(4, 16), inputs="dense")
    levels = open_store(tmp_path / "store").levels
    write_gguf(tmp_path / "m.gguf", loaded, levels, [0] * len(levels.units))
    assert distance(tmp_path / "m.gguf", compressed(loaded, levels, [0] * len(levels.units)).model) < 1e-5


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    loaded = made(MODELS["mixtral"]())
    levels = levels_of(loaded, ["Q4_0", "Q8_0"], tmp_path / "store")
    uneven = [int(".experts.1." in unit.name) for unit in levels.units]
    with pytest.raises(ModelError, match="experts of 'blk.0.ffn_gate_exps.weight' have different types.*tie"):
        write_gguf(tmp_path / "m.gguf", loaded, levels, uneven)
    with pytest.raises(InvalidSettingError, match="no ggml type"):
        export_gguf(tmp_path / "p.json", tmp_path / "m.gguf", embedding="Q4_K_M")
    tied = made(MODELS["qwen2"]())
    levels = levels_of(tied, ["Q8_0"], tmp_path / "tied")
    with pytest.raises(ModelError, match="its head is its embedding"):
        write_gguf(tmp_path / "m.gguf", tied, levels, [0] * len(levels.units), types={"output.weight": "Q8_0"})
    unknown = LoadedModel.from_model(
        random_model(
            transformers.GPTNeoXConfig(
                vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
            )
        )
    )
    with pytest.raises(ModelError, match="model_type 'gpt_neox': known are llama"):
        write_gguf(tmp_path / "m.gguf", unknown, levels, [])
    assert not (tmp_path / "m.gguf").exists()
    with pytest.raises(ModelError, match="llama.cpp cannot load"):
        LlamaCpp(tmp_path / "none.gguf")


def test_a_file_of_another_model_is_told(tmp_path: Path) -> None:
    loaded = made(MODELS["llama"]())
    levels = levels_of(loaded, ["Q8_0"], tmp_path / "store")
    write_gguf(tmp_path / "m.gguf", loaded, levels, [0] * len(levels.units))
    with torch.no_grad():
        loaded.model.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(-5)  # type: ignore[operator]
    with pytest.raises(ModelError, match="llama.cpp computes other outputs"):
        difference(tmp_path / "m.gguf", loaded)


def test_a_profile_becomes_a_file_that_the_command_has_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": 400, "num_hidden_layers": 1})
    random_model(config, spread=0.08).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    byte_level_tokenizer("qwen2").save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "method": "ggml", "levels": ["Q4_K", "Q8_0"], "average": 6.5}
    settings |= {"store": str(tmp_path / "store"), "build": {"calibration_tokens": 64, "sequence_length": 32}}
    settings |= {"sequence_length": 16, "calibration_tokens": 64, "held_out_tokens": 32, "tokens": 16}
    rehearsed: Any = problem_factory("language_model")
    rehearsed.preview(settings)
    rehearsed.prepare(settings, lambda done, total, what: None)
    problem: Any = make_problem("language_model", **settings)
    levels = [number % 2 for number in range(len(problem.space.units))]
    profile = {
        "problem": {"name": "language_model", "settings": settings},
        "held_out": {"loss": 0.25},
        "average": problem.space.average(levels),
        "levels": levels,
        "units": {unit.name: unit.levels[k] for unit, k in zip(problem.space.units, levels, strict=True)},
    }
    (tmp_path / "p.json").write_text(json.dumps(profile))
    path = tmp_path / "out" / "m.gguf"
    with pytest.raises(SystemExit, match="0"):
        main(["export", str(tmp_path / "p.json"), str(path), "--embedding", "q2_k", "--head", "Q8_0"])
    said = capsys.readouterr().out
    assert f"{path.stat().st_size:,} bytes, held-out loss 0.25; llama.cpp reads it" in said
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (types["token_embd.weight"], types["output.weight"]) == ("Q2_K", "Q8_0")
    assert {types["blk.0.attn_q.weight"], types["blk.0.attn_k.weight"]} == {"Q4_K", "Q8_0"}
    for arguments, message in (
        ([str(path)], "exists already"),
        ([str(path), "--dtype", "float16"], "a GGUF file has the types of its levels"),
        ([str(tmp_path / "folder"), "--head", "Q8_0"], "name an output that ends in .gguf"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["export", str(tmp_path / "p.json"), *arguments])
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("tied", [False, True])
def test_a_search_of_embedding_and_head_too_ends_in_a_file_of_the_size_that_was_counted(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of this vocabulary do not fill whole units of the file's alignment."""
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    fast = byte_level_tokenizer("smollm")
    words = len(fast)
    dense = made(transformers.LlamaConfig(**SIZES | {"vocab_size": words, "tie_word_embeddings": tied}))
    dense = LoadedModel(dense.model, fast, dense.identity, dense.name)
    build_drop_store(dense, tmp_path / "none", kinds=("block",))
    kept = open_store(tmp_path / "none").levels
    write_gguf(tmp_path / "f16.gguf", dense, kept, [1] * len(kept.units))
    settings: dict[str, Any] = {"model": str(tmp_path / "f16.gguf"), "method": "ggml", "serve": "llama.cpp"}
    settings |= {"levels": ["Q2_K", "Q4_0"], "size": "0.5 bytes a weight", "store": str(tmp_path / "store")}
    settings |= {"build": {"calibration_tokens": 64, "sequence_length": 32, "embedding": True}, "dtype": "float32"}
    settings |= {"sequence_length": 16, "calibration_tokens": 64, "held_out_tokens": 64, "tokens": 16}
    task: Any = problem_factory("language_model")
    task.prepare(settings, lambda done, total, what: None)
    problem: Any = make_problem("language_model", **settings)
    units = problem.space.units
    levels = [number % 2 for number in range(len(units))]
    held_out = problem.validate(tuple(levels))
    profile = {
        "problem": {"name": "language_model", "settings": settings},
        "held_out": held_out,
        "average": problem.space.average(levels),
        "levels": levels,
        "units": {unit.name: unit.levels[k] for unit, k in zip(units, levels, strict=True)},
    }
    (tmp_path / "p.json").write_text(json.dumps(profile))
    path = tmp_path / "m.gguf"
    found = export_gguf(tmp_path / "p.json", path)
    file = FileSize.of(settings["model"], task.task(settings).open_levels())
    assert path.stat().st_size == found.bytes == file.rest + problem.space.cost(tuple(levels))
    assert file.weights - file.searched == sum(p.numel() for p in dense.model.parameters() if p.dim() == 1)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["token_embd.weight"] == "Q2_K"
    assert types.get("output.weight") == (None if tied else "Q4_0")
    assert "| model.embed_tokens | Q2_K |" in path.with_name("m.gguf.md").read_text()
    divergence, loss = losses(path, dense.model, problem.held_out)
    assert divergence == pytest.approx(held_out["loss"], rel=0.01)
    assert math.exp(loss) == pytest.approx(held_out["perplexity"], rel=0.01)
    with pytest.raises(ModelError, match=r"type of 'token_embd.weight' was searched: leave out --embedding"):
        export_gguf(tmp_path / "p.json", tmp_path / "n.gguf", embedding="Q8_0")
