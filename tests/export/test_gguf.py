"""GGUF files of tiny models, run by llama.cpp: its outputs are those of the dequantized model."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn

from evo_hpo.cli.commands import main
from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.export.evaluation import evaluate
from evo_hpo.export.folder import place
from evo_hpo.export.gguf_file import difference, export_gguf, write_gguf
from evo_hpo.export.llama_cpp import LlamaCpp
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.drop import build_drop_store
from evo_hpo.levels.ggml import GGML_TYPES, dequantize, quantize, row_bytes
from evo_hpo.levels.level_set import Choice, LevelSet, bundled
from evo_hpo.levels.manifest import LevelRecord, UnitRecord
from evo_hpo.levels.packing import GgmlBlocks
from evo_hpo.levels.quantizers import GPTQ, Ggml
from evo_hpo.levels.serving import STACKED
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import LoadedModel, load_model
from evo_hpo.models.structure import linear_modules, outer_matrices
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.file_size import FileSize
from evo_hpo.search.registry import make_problem, problem_factory
from tests.tiny import VOCABULARY, random_model, tiny_tokens

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, head_dim=64),
    "gemma": lambda: transformers.GemmaConfig(**_SIZES, head_dim=64),
    "gemma2": lambda: transformers.Gemma2Config(**_SIZES, head_dim=64, query_pre_attn_scalar=64),
    "mixtral": lambda: transformers.MixtralConfig(**_SIZES, num_local_experts=3, sliding_window=None),
}
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S")  # tables of these take seconds to make
_FAST: Any = transformers.PreTrainedTokenizerFast
TOKENS = [int(token) for token in tiny_tokens(1, 32, seed=3)[0]]


def made(config: transformers.PretrainedConfig) -> LoadedModel:
    """A model whose norms, biases and matrices are all far from what they begin with."""
    model = random_model(config, spread=0.08)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand(parameter.shape, generator=generator) / 2)
    return LoadedModel.from_model(model)


def levels_of(loaded: LoadedModel, types: Sequence[str], folder: Path) -> LevelSet:
    build_store(loaded, folder, Ggml(types), tiny_tokens(4, 16), inputs="dense")
    return open_store(folder).levels


def distance(path: Path, model: nn.Module, tokens: Sequence[int] = TOKENS) -> float:
    """Relative squared difference of llama.cpp's logits from a model's, each position's mean taken off."""
    with LlamaCpp(path) as program:
        theirs = torch.from_numpy(program.logits(tokens))
    with torch.inference_mode():
        ours = model(input_ids=torch.tensor([list(tokens)])).logits[0]
    ours, theirs = (found - found.mean(-1, keepdim=True) for found in (ours, theirs))
    return float((ours - theirs).square().sum() / ours.square().sum())


def bits(levels: LevelSet, assignment: Sequence[int]) -> int:
    """What a budget counts."""
    chosen = (unit.costs[level] for unit, level in zip(levels.units, assignment, strict=True))
    return sum(cost for cost in chosen if isinstance(cost, int))


def compressed(loaded: LoadedModel, levels: LevelSet, assignment: Sequence[int]) -> LoadedModel:
    """The model with the weights of an assignment in place."""
    model = copy.deepcopy(loaded.model)
    place(model, levels, assignment)
    return LoadedModel(model, loaded.tokenizer, loaded.identity, loaded.name)


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


class Blocks:
    """Each unit has one level of one type, in turn."""

    def __init__(self, loaded: LoadedModel, types: Sequence[str], include: str = ".") -> None:
        self._made: dict[str, GgmlBlocks] = {}
        outer, layers = outer_matrices(loaded.model), linear_modules(loaded.model)
        names = [name for name in [*outer, *layers] if re.search(include, name)]
        wholes = list(dict.fromkeys(bundled(name, STACKED) for name in names))
        rows = []
        for name in names:
            weight = loaded.model.get_submodule(name).weight.detach()  # type: ignore[operator]
            kind = types[wholes.index(bundled(name, STACKED)) % len(types)]
            blocks = self._made[name] = GgmlBlocks(kind, blocks_of(weight, kind))
            level = LevelRecord(
                kind, blocks.storage_bits, weight.numel(), 1, blocks.storage_bits, 0.5, blocks.settings()
            )
            rows.append(
                (name, [[Choice(self, UnitRecord(name, (name,), weight.shape, weight.numel(), False, ()), level)]])
            )
        self.levels = LevelSet(rows, "bits")

    def unit_weights(self, unit: str, label: str) -> dict[str, torch.Tensor]:
        return {unit: self._made[unit].decode()}

    def unit_encoded(self, unit: str, label: str) -> GgmlBlocks:
        return self._made[unit]


def blocks_of(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A matrix quantized; of types that need large tables for that, random blocks of the same spread."""
    if kind not in SLOW:
        return quantize(weight, kind)
    rng = np.random.default_rng(weight.numel())
    shape = (len(weight), weight.shape[1] // 256, row_bytes(kind, 256))
    data = rng.integers(0, 256, shape, dtype=np.uint8)
    spread = dequantize(scaled(data, kind, 1.0), kind).std()
    return scaled(data, kind, float(weight.std() / spread))


def scaled(data: npt.NDArray[np.uint8], kind: str, scale: float) -> torch.Tensor:
    """Blocks (rows x blocks x bytes) with another scale, as rows x bytes."""
    half = int(np.float16(scale).view(np.uint16))
    if kind == "IQ1_M":  # four bits of the scale in each of the last four words
        words = data[..., -8:].view("<u2")
        words[...] = (words & 0x0FFF) | np.array([(half >> 4 * part & 0xF) << 12 for part in range(4)], dtype=np.uint16)
    else:
        data[..., :2].view("<u2")[...] = half
    return torch.from_numpy(data.reshape(len(data), -1).copy())


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
    assert distance(tmp_path / "m.gguf", model) < 5e-3 < 0.02 * distance(tmp_path / "m.gguf", loaded.model)
    text = tiny_tokens(4, 32, seed=3)
    expected = Evaluator(loaded.model, levels, text, threads=1).evaluate_held_out(tuple(assignment), text)
    divergence, loss = losses(tmp_path / "m.gguf", loaded.model, text)
    assert divergence == pytest.approx(expected["loss"], rel=0.01)
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
    loaded = made(transformers.LlamaConfig(**_SIZES | {"num_hidden_layers": 1}))
    for kind in GGML_TYPES:
        levels = Blocks(loaded, [kind], "embed|head").levels
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, loaded, levels, [0, 0])
        held = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
        assert {held["token_embd.weight"], held["output.weight"]} == {kind}
        assert distance(path, compressed(loaded, levels, [0, 0]).model) < 1e-3


def test_every_type_is_read_by_llama_cpp(tmp_path: Path) -> None:
    loaded = made(transformers.LlamaConfig(**_SIZES | {"num_hidden_layers": 1}))
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
        lines = path.with_name(f"{path.name}.tensor-types.txt").read_text().splitlines()
        searched = {name: kind.lower() for name, kind in held.items() if name.startswith("blk.") and "norm" not in name}
        assert dict(line.split("=") for line in lines) == searched
        seen |= set(held.values())
    assert set(types) <= seen


def test_dropped_blocks_leave_the_file_and_dropped_parts_say_nothing(tmp_path: Path) -> None:
    loaded = made(transformers.LlamaConfig(**_SIZES | {"num_hidden_layers": 3}))
    build_drop_store(loaded, tmp_path / "store", kinds=("attention", "mlp"))
    levels = open_store(tmp_path / "store").levels
    silent = {"model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp"}
    assignment = [int(unit.name not in silent) for unit in levels.units]
    write_gguf(tmp_path / "m.gguf", loaded, levels, assignment)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {t.name.split(".")[1] for t in reader.tensors if t.name.startswith("blk.")} == {"0", "1"}
    assert reader.fields["llama.block_count"].contents() == 2
    assert distance(tmp_path / "m.gguf", compressed(loaded, levels, assignment).model) < 1e-5
    with pytest.raises(ModelError, match="drops every block"):
        write_gguf(tmp_path / "n.gguf", loaded, levels, [0] * len(levels.units))


def test_a_template_gives_its_header_and_what_was_not_searched(tmp_path: Path) -> None:
    loaded = made(MODELS["llama"]())
    levels = levels_of(loaded, ["Q4_K", "F16"], tmp_path / "store")
    write_gguf(tmp_path / "t.gguf", loaded, levels, [1] * len(levels.units), types={"token_embd.weight": "Q8_0"})
    template = gguf.GGUFReader(tmp_path / "t.gguf")
    write_gguf(tmp_path / "m.gguf", loaded, levels, [0] * len(levels.units), template=tmp_path / "t.gguf")
    found = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {k: f.contents() for k, f in found.fields.items()} == {k: f.contents() for k, f in template.fields.items()}
    before, after = ({t.name: t for t in reader.tensors} for reader in (template, found))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.startswith("blk.") and "norm" not in name:
            assert tensor.tensor_type.name == "Q4_K"
        else:
            assert np.array_equal(tensor.data, before[name].data)
    other = made(MODELS["qwen3"]())
    with pytest.raises(ModelError, match="template is of architecture 'llama', the model's is 'qwen3'"):
        write_gguf(tmp_path / "n.gguf", other, levels, [0] * len(levels.units), template=tmp_path / "t.gguf")


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


TEXTS = ["It isn't 1234 things; don't count 12,5 % of them.\n\n  def f(x):\n\treturn x", "naïve — 3 °C, 你好"]


def byte_level_tokenizer(split: str) -> Any:
    """A tokenizer that cuts text as the named family does, with merges of a few texts."""
    tokenizer = Tokenizer(models.BPE())
    pieces = {
        "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
    pieces["llama-bpe"] = pieces["qwen2"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split not in pieces)
    first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
    if split in pieces:
        first = [pre_tokenizers.Split(Regex(pieces[split]), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS * 3, "return things 1234 isn't don't count"], trainer)
    return _FAST(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_byte_level_tokenizers_cut_text_alike(split: str, tmp_path: Path) -> None:
    fast = byte_level_tokenizer(split)
    loaded = made(transformers.LlamaConfig(**_SIZES | {"vocab_size": 400, "num_hidden_layers": 1}))
    loaded = LoadedModel(loaded.model, fast, loaded.identity, loaded.name)
    levels = levels_of(loaded, ["Q8_0"], tmp_path / "store")
    write_gguf(tmp_path / "m.gguf", loaded, levels, [0] * len(levels.units))
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"].contents() == split
    with LlamaCpp(tmp_path / "m.gguf") as program:
        for text in TEXTS:
            assert program.tokens(text) == fast(text, add_special_tokens=False)["input_ids"]
    assert difference(tmp_path / "m.gguf", compressed(loaded, levels, [0] * len(levels.units))) < 1e-2


def test_a_file_beside_the_folder_it_was_made_from_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read from the file has other rules for the same tokens."""
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))
    fast = byte_level_tokenizer("smollm")
    model: Any = made(transformers.LlamaConfig(**_SIZES | {"vocab_size": len(fast), "num_hidden_layers": 1})).model
    model.save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    levels = Blocks(loaded, ["Q8_0"]).levels
    write_gguf(tmp_path / "m.gguf", loaded, levels, [0] * len(levels.units))
    (tmp_path / "text.txt").write_text(TEXTS[0] * 40)
    text = f"whole:{tmp_path / 'text.txt'}"
    settings: dict[str, Any] = {"original": str(tmp_path / "model"), "sequence_length": 32, "tokens": 64}
    table = evaluate([str(tmp_path / "m.gguf")], [text], **settings)
    figures = table.results[1].texts[text].kl
    assert figures is not None
    assert 0 < figures.mean < 0.05
    rules = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:1]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(ModelError, match="another tokenizer"):
        evaluate([str(tmp_path / "m.gguf")], [text], **settings)


def test_a_tokenizer_that_is_cut_otherwise_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    fast = _FAST(tokenizer_object=tokenizer)
    loaded = made(MODELS["llama"]())
    levels = levels_of(loaded, ["Q8_0"], tmp_path / "store")
    with pytest.raises(ModelError, match="tokenizer of type 'WordLevel' is not written: convert the model"):
        write_gguf(
            tmp_path / "m.gguf", LoadedModel(loaded.model, fast, loaded.identity, ""), levels, [0] * len(levels.units)
        )


def test_a_profile_becomes_a_file_that_the_command_has_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.LlamaConfig(**_SIZES | {"vocab_size": 400, "num_hidden_layers": 1})
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
    dense = made(transformers.LlamaConfig(**_SIZES | {"vocab_size": words, "tie_word_embeddings": tied}))
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


def test_tokenizers_with_byte_fallback_cut_text_alike(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXTS[0].replace("\t", " ")] * 3 + ["return things don't count"] * 2, trainer)
    rules = json.loads(tokenizer.to_str())
    rules["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    rules["added_tokens"] = rules["added_tokens"][:3]
    size = len(rules["model"]["vocab"])
    fast = _FAST(tokenizer_object=Tokenizer.from_str(json.dumps(rules)), bos_token="<s>", eos_token="</s>")
    loaded = made(transformers.LlamaConfig(**_SIZES | {"vocab_size": size, "num_hidden_layers": 1}))
    loaded = LoadedModel(loaded.model, fast, loaded.identity, loaded.name)
    levels = levels_of(loaded, ["Q8_0"], tmp_path / "store")
    write_gguf(tmp_path / "m.gguf", loaded, levels, [0] * len(levels.units))
    with LlamaCpp(tmp_path / "m.gguf") as program:
        for text in TEXTS:
            assert program.tokens(text) == fast(text, add_special_tokens=False)["input_ids"]
