"""The final evaluation against plain transformers: perplexity by chunk, strided, divergence, intervals, a table."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from typer.testing import CliRunner

from evo_hpo.cli.commands import app
from evo_hpo.errors import InvalidSettingError, MissingPackageError, ModelError, TextError
from evo_hpo.export.evaluation import evaluate
from evo_hpo.export.figures import Estimate, measure
from evo_hpo.export.folder import export_profile
from evo_hpo.export.harness_tasks import HarnessTasks
from evo_hpo.export.reading import load_served
from evo_hpo.models.text import token_stream
from tests.export.test_packed import found, settings
from tests.tiny import save_tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVO_HPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", spread=0.2)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The model with weights that are a little off."""
    save_tiny(tmp_path / "other", spread=0.2)
    changed: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.02)
    changed.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = ["the cat", "sat on", "the mat", "a hat", "that rat", "and", "the fat cat"]
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(words, 60)) for _ in range(12)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents))
    return tmp_path / "text.jsonl"


def stream_of(model: Path, text: Path, tokens: int) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return torch.from_numpy(np.asarray(token_stream(str(text), tokenizer, "held_out")[:tokens], dtype=np.int64))


def test_perplexity_by_chunk_is_what_the_loss_of_transformers_says(model: Path, other: Path, text: Path) -> None:
    table = evaluate([str(other)], [str(text)], original=str(model), sequence_length=32, tokens=256)
    first, second = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (model, other))
    rows = stream_of(model, text, 256).view(8, 32)
    with torch.no_grad():
        losses = [float(second(input_ids=row[None], labels=row[None]).loss) for row in rows]
        log_p, log_q = (torch.log_softmax(m(input_ids=rows).logits[:, :-1].double(), -1) for m in (first, second))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1).numpy()
    got = table.results[1].texts[str(text)]
    assert got.perplexity.mean == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert got.kl is not None
    assert got.kl.mean == pytest.approx(kl.mean(), rel=1e-4)
    low, high = stats.t.interval(0.95, 7, loc=kl.mean(), scale=stats.sem(kl))
    assert (got.kl.low, got.kl.high) == pytest.approx((low, high), rel=1e-4)
    assert got.above is not None
    ratio = got.perplexity.mean / table.results[0].texts[str(text)].perplexity.mean - 1
    assert got.above.mean == pytest.approx(ratio, rel=1e-6)
    assert table.results[0].name == "original"
    assert table.results[0].texts[str(text)].kl is None


def test_strided_perplexity_gives_each_token_the_context_before_it(model: Path, text: Path) -> None:
    """As in the page of transformers' documentation, whose labels of known tokens are -100."""
    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    stream = stream_of(model, text, 128)
    losses = []
    for begin in range(0, 128 - 32 + 1, 8):
        window = stream[begin : begin + 32][None]
        labels = window.clone()
        if begin:
            labels[:, :-8] = -100
        with torch.no_grad():
            losses.append(float(plain(input_ids=window, labels=labels).loss))
    got = measure(plain, stream.view(4, 32), stride=8)
    assert got.cross_entropy == pytest.approx(losses, rel=1e-5)
    assert measure(plain, stream.view(4, 32), stride=32).cross_entropy[0] == pytest.approx(losses[0], rel=1e-5)


def test_strided_perplexity_is_the_mean_over_tokens_not_over_windows(model: Path, other: Path, text: Path) -> None:
    """The first window predicts more tokens than the others; the page of transformers' documentation counts tokens."""
    table = evaluate([str(other)], [str(text)], original=str(model), sequence_length=32, tokens=128, stride=8)
    stream, plain = stream_of(model, text, 128), AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    total = count = 0.0
    for begin in range(0, 128 - 32 + 1, 8):
        window = stream[begin : begin + 32]
        with torch.no_grad():
            log_q = torch.log_softmax(plain(input_ids=window[None]).logits[0, :-1].double(), -1)
        losses = -log_q.gather(-1, window[1:, None])[-8 if begin else 0 :, 0]
        total, count = total + float(losses.sum()), count + len(losses)
    assert count == 127
    assert table.results[1].texts[str(text)].perplexity.mean == pytest.approx(math.exp(total / count), rel=1e-6)
    equal = Estimate.of([1.0, 2.0, 4.0], [5, 5, 5])
    assert (equal.mean, equal.low, equal.high) == pytest.approx(
        (7 / 3, *stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0])))
    )


def test_an_interval_holds_the_mean_in_nineteen_of_twenty_samples() -> None:
    rng = np.random.default_rng(1)
    estimates = [Estimate.of(list(rng.normal(2.0, 0.7, 6))) for _ in range(2000)]
    assert np.mean([e.low <= 2.0 <= e.high for e in estimates]) == pytest.approx(0.95, abs=0.015)
    assert math.isnan(Estimate.of([1.0]).low)


def test_profile_export_and_other_models_stand_in_one_table_and_picture(
    model: Path, other: Path, text: Path, tmp_path: Path
) -> None:
    profile, _ = found(tmp_path, settings(model, serve="transformers"))
    export_profile(profile, tmp_path / "packed", "float32", "compressed-tensors")
    arguments = ["evaluate", str(profile), str(tmp_path / "packed"), str(other), "--text", str(text)]
    arguments += ["--sequence-length", "32", "--tokens", "256", "--output", str(tmp_path / "table")]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    data = json.loads((tmp_path / "table/evaluation.json").read_text())
    rows = {row["name"]: row for row in data["results"]}
    assert list(rows) == ["original", "profile", "packed", "other"]
    of_profile, of_packed = (rows[name]["texts"][str(text)] for name in ("profile", "packed"))
    assert of_profile["kl"]["mean"] == pytest.approx(of_packed["kl"]["mean"], rel=1e-4)
    assert len({row["weights"] for row in data["results"]}) == 1  # scales are no weights
    assert data["read"] == {str(text): 256}
    assert rows["packed"]["bytes"] == (tmp_path / "packed/model.safetensors").stat().st_size
    assert (tmp_path / "table/evaluation.png").stat().st_size > 5000
    assert "packed" in shown
    assert "KL, nats a token" in shown
    before = (tmp_path / "table/evaluation.json").read_bytes()
    again = ["evaluate", str(other), "--text", str(text), "--sequence-length", "32", "--tokens", "64"]
    CliRunner().invoke(app, [*again, "--output", str(tmp_path / "table")], catch_exceptions=False)
    assert (tmp_path / "table/evaluation.json").read_bytes() == before
    assert {path.stem for path in (tmp_path / "table").iterdir()} == {"evaluation", "evaluation-2"}


def test_a_profile_of_dropped_modules_takes_what_the_original_takes(model: Path, text: Path, tmp_path: Path) -> None:
    """Dropped modules are zeros in the folder that is exported, which is dense: nothing is smaller."""
    profile, _ = found(tmp_path, settings(model, method="drop", build={}, levels=[], average=1))
    table = evaluate([str(profile)], [str(text)], sequence_length=32, tokens=64)
    first, second = table.results
    assert first.bytes <= second.bytes < first.bytes + 25 * 140  # a header for each of 21 tensors and one of the file
    assert first.weights == second.weights


def test_models_that_cannot_be_compared_are_refused(model: Path, other: Path, text: Path, tmp_path: Path) -> None:
    rules = json.loads((other / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:1]
    (other / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(ModelError, match="another tokenizer"):
        evaluate([str(other)], [str(text)], original=str(model), sequence_length=32, tokens=64)
    with pytest.raises(ModelError, match=f"{other} has another tokenizer than {model}"):  # also without an original
        evaluate([str(model), str(other)], [str(text)], sequence_length=32, tokens=64)
    with pytest.raises(InvalidSettingError, match="stride=33"):
        evaluate([str(other)], [str(text)], sequence_length=32, tokens=64, stride=33)
    with pytest.raises(InvalidSettingError, match="'self' is another one for every model"):
        evaluate([str(model)], ["self"], sequence_length=32, tokens=64)


def test_models_that_cannot_read_the_texts_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=280, n_positions=48, n_embd=32, n_layer=1, n_head=2)
    learned = str(save_tiny(tmp_path / "learned", config))
    assert evaluate([learned], [str(text)], sequence_length=48, tokens=96).results
    with pytest.raises(ModelError, match="64 tokens are longer than the 48 positions"):
        evaluate([learned], [str(text)], sequence_length=64, tokens=128)
    config.vocab_size = 50
    with pytest.raises(ModelError, match="the model knows 0 to 49"):
        evaluate([str(save_tiny(tmp_path / "few", config))], [str(text)], sequence_length=48, tokens=96)
    config.vocab_size = 300
    with pytest.raises(ModelError, match="gives 300 logits and .* 280: there is no KL"):
        evaluate([str(save_tiny(tmp_path / "more", config))], [str(text)], original=str(model), sequence_length=48)


def test_the_size_of_a_model_is_that_of_the_files_that_are_loaded(model: Path, text: Path) -> None:
    taken = (model / "model.safetensors").stat().st_size
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (given,) = evaluate([str(model)], [str(text)], sequence_length=32, tokens=64).results
    assert given.bytes == taken
    (model / "model.safetensors").unlink()
    (found,) = evaluate([str(model)], [str(text)], sequence_length=32, tokens=64).results
    assert found.bytes == (model / "pytorch_model.bin").stat().st_size > 0
    assert found.texts == given.texts


def test_where_the_table_cannot_go_is_known_before_anything_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr("evo_hpo.export.evaluation.evaluate", lambda *_, **__: pytest.fail("it was measured"))
        for place in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(InvalidSettingError, match="cannot make the folder"):
                CliRunner().invoke(app, ["evaluate", str(model), "--output", str(place)], catch_exceptions=False)
    refused = ["evaluate", str(model), "--text", str(tmp_path / "none.txt"), "--output", str(tmp_path / "table")]
    with pytest.raises(TextError, match=r"none\.txt"):
        CliRunner().invoke(app, refused, catch_exceptions=False)
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "3"], "limit=3 are of tasks"),
        (["--tasks", "cats", "--limit", "0"], "limit=0 must be at least 1"),
        (["--tasks", "cats,"], "tasks='cats,' must be names separated by commas"),
        (["--tasks", "cats", "--task-folder", "nowhere"], "task_folder='nowhere' is no folder"),
    ],
)
def test_tasks_are_checked_before_a_model_is_loaded(options: list[str], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        CliRunner().invoke(app, ["evaluate", "nowhere", *options], catch_exceptions=False)


def _group(config: dict[str, Any]) -> Any:
    return next(iter(config["config_groups"].values()))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder, _: (folder / "tokenizer.json").write_text("{"),
        lambda folder, _: (folder / "model.safetensors").write_bytes(b"x"),
        lambda _, config: config.pop("config_groups"),
        lambda _, config: _group(config).update(weights=None),
        lambda _, config: _group(config)["weights"].update(symmetric=False),
        lambda _, config: _group(config)["weights"].update(num_bits=9),
    ],
)
def test_a_damaged_folder_of_packed_weights_is_refused_in_one_line(model: Path, tmp_path: Path, damage: Any) -> None:
    profile, _ = found(tmp_path, settings(model, serve="transformers"))
    export_profile(profile, tmp_path / "packed", "float32", "compressed-tensors", check=False)
    config = json.loads((tmp_path / "packed/config.json").read_text())
    damage(tmp_path / "packed", config["quantization_config"])
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="packed") as caught:
        load_served(str(tmp_path / "packed"))
    assert "\n" not in str(caught.value)


def test_a_configuration_that_is_none_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    wrong: Any
    for wrong in ([], config | {"quantization_config": "compressed-tensors"}):
        (model / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(ModelError, match=r"damaged config\.json|is quantized already"):
            load_served(str(model))


def test_tasks_go_through_the_harness_with_the_model_that_is_measured(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its package is not installed with the tests: a stand-in with its names and the shape of its results."""
    seen: dict[str, Any] = {}

    class Manager:
        def __init__(self, include_path: str | None, include_defaults: bool) -> None:
            seen["places"] = include_path, include_defaults
            self.all_tasks = ["cats"]

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        seen.update(given)
        return {"results": {"cats": {"alias": "cats", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 4}}}

    stubs: dict[str, dict[str, Any]] = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **given: given},
        "lm_eval.tasks": {"TaskManager": Manager},
    }
    for name, content in stubs.items():
        module = types.ModuleType(name)
        for key, value in content.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    given: dict[str, Any] = {"sequence_length": 32, "tokens": 64}
    table = evaluate([str(model)], [str(text)], tasks=HarnessTasks(("cats",), tmp_path, 4), **given)
    assert table.results[0].tasks == {"cats/acc": 0.5, "cats/acc_stderr": 0.1}
    assert seen["places"] == (str(tmp_path), False)  # nothing is looked for elsewhere
    assert seen["limit"] == 4
    assert isinstance(seen["model"]["pretrained"], torch.nn.Module)
    monkeypatch.setattr("evo_hpo.export.evaluation.measure", lambda *_: pytest.fail("a text was measured"))
    with pytest.raises(InvalidSettingError, match="has no task 'dogs'"):
        evaluate([str(model)], [str(text)], tasks=HarnessTasks(("dogs",), tmp_path), **given)
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"evo-hpo\[lm-eval\]"):
        evaluate(["no such model"], [str(text)], tasks=HarnessTasks(("cats",)), **given)  # before anything is loaded
    with pytest.raises(InvalidSettingError, match="limit=-1 must be at least 1"):
        evaluate([str(model)], [str(text)], tasks=HarnessTasks(("cats",), limit=-1), **given)
