"""What is dropped adds nothing and leaves the stream as it is; what cannot be left out is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measurements.architectures import examine
from benchmarks.measurements.tiny_architectures import tiny_architecture
from evo_hpo.errors import ModelError
from evo_hpo.levels.build import build
from evo_hpo.levels.drop import build_drop_store
from evo_hpo.models.dropping import check_droppable, zero_parameters
from evo_hpo.models.gates import GatedModel, example_tokens
from evo_hpo.models.loading import LoadedModel, load_model
from evo_hpo.models.structure import decoder_blocks, droppable_modules
from evo_hpo.scoring.evaluator import Evaluator
from tests.tiny import DropLevels, tiny_tokens


@pytest.mark.parametrize("name", ["bloom", "mpt", "opt", "gemma2", "gptj", "gpt_oss", "gpt_neox_japanese"])
def test_losses_and_folders_equal_plain_transformers(name: str) -> None:
    """Bloom and MPT add the residual inside of a module.

    The others: biases, norms on both sides, parallel parts, experts, a bias that stands alone.
    """
    assert set(examine(name).found.values()) == {"ok"}


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("opt (norms after)", "attention", "OPTForCausalLM cannot be dropped.*norm after the addition"),
        ("opt (norms after)", "block", "OPTForCausalLM cannot be dropped.*norm after the addition"),
        ("bloom (residual after the norm)", "block", "whole blocks of BloomForCausalLM cannot be dropped"),
        ("minimax", "block", "whole blocks of MiniMaxForCausalLM cannot be dropped.*scaled residual stream"),
        ("doge", "mlp", "modules of DogeForCausalLM cannot be dropped.*scaled residual stream"),
        ("zamba2", "block", "Zamba2ForCausalLM cannot be dropped: it shares weights with"),
        ("dbrx", "attention", "DbrxForCausalLM cannot be dropped"),
        ("blenderbot", "attention", "encoder_attn of BlenderbotForCausalLM cannot be dropped: it does not run"),
    ],
)
def test_what_cannot_be_left_out_is_refused_before_a_store_is_written(
    name: str, kind: str, reason: str, tmp_path: Path
) -> None:
    loaded = LoadedModel.from_model(tiny_architecture(name))
    with pytest.raises(ModelError, match=reason):
        build_drop_store(loaded, tmp_path / "store", (kind,))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["openai-gpt", "zamba2"])
def test_post_norm_and_shared_blocks_are_compressed_all_the_same(name: str) -> None:
    """openai-gpt's blocks return a list; Zamba2's share weights, which are one layer with one level."""
    found = examine(name).found
    assert {found[kind] for kind in ("quantized", "gptq", "sparse")} == {"ok"}
    assert all(
        "cannot be dropped" in found[kind] or "no attention module" in found[kind] for kind in ("parts", "blocks")
    )


def test_the_evaluator_refuses_levels_that_were_made_elsewhere() -> None:
    model = tiny_architecture("opt (norms after)")
    with pytest.raises(ModelError, match="OPTForCausalLM cannot be dropped"):
        Evaluator(model, DropLevels(model), tiny_tokens(), threads=1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert", "BertLMHeadModel is no causal language model"),
        ("gemma3n_text", "Gemma3nForCausalLM is not supported: its blocks cannot be run one by one"),
        ("rwkv", "RwkvForCausalLM is not supported: it changes its weights in a forward pass"),
    ],
)
def test_an_architecture_that_cannot_be_scored_is_refused_by_name(name: str, reason: str) -> None:
    model = tiny_architecture(name)
    with pytest.raises(ModelError, match=reason):
        GatedModel(model, example_tokens(model))


def test_it_is_refused_before_anything_is_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel.from_model(tiny_architecture("bert"))
    monkeypatch.setattr("evo_hpo.models.loading.load_model", lambda *_: loaded)
    with pytest.raises(ModelError, match="no causal language model"):
        build("bert", tmp_path / "store", method="rtn")
    assert not (tmp_path / "store").exists()


def test_the_check_changes_no_weight() -> None:
    model: Any = tiny_architecture("bloom")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    members = {m for found in droppable_modules(model, "attention").values() for m in found}
    check_droppable(model, members | set(decoder_blocks(model)), example_tokens(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with zero_parameters(model.parameters()):
        assert not any(parameter.any() for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_code_that_comes_with_a_checkpoint_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "new", "auto_map": {"AutoModelForCausalLM": "modeling_new.NewForCausalLM"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="code of its own.*modeling_new.NewForCausalLM"):
        load_model(str(tmp_path))
