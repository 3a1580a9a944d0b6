"""Inputs rounded as llama.cpp rounds them: against llama.cpp's own products, and losses against plain passes."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels import ggml
from evo_hpo.levels.ggml import GGML_TYPES, dequantize, ggml_inputs, ggml_number, row_bytes
from evo_hpo.models.experts import unfuse_experts
from evo_hpo.scoring.arithmetic import InputRounding, InputTypes, rounded
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.scoring.sensitivities import SensitivityPass
from evo_hpo.scoring.task import LanguageModelTask
from evo_hpo.search.problem import Minibatch
from tests.export.gguf_models import MODELS, Blocks, blocks_of, compressed, levels_of, made
from tests.tiny import tiny_model, tiny_tokens

MINIBATCH = Minibatch(seed=5, tokens=64)


class _Traits(ctypes.Structure):
    """The leading fields of what llama.cpp knows of a type on a CPU."""

    _fields_ = (
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        (
            "product",
            ctypes.CFUNCTYPE(
                None,
                ctypes.c_int,
                *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t),
                ctypes.c_int,
            ),
        ),
        ("inputs", ctypes.c_int),
    )


def traits_of(number: int) -> Any:
    shared = ggml.library()
    shared.ggml_cpu_init()
    shared.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_Traits)
    return shared.ggml_get_type_traits_cpu(number).contents


@pytest.mark.parametrize("kind", GGML_TYPES)
def test_products_are_those_that_llama_cpp_computes(kind: str) -> None:
    """Of its own blocks with inputs that it rounded itself, by its functions."""
    number, columns = int(ggml_number(kind)), 512
    traits = traits_of(number)
    wanted = ggml.library().ggml_type_name(traits.inputs).decode().upper()
    assert wanted.replace("Q8_1", "Q8_0") == ggml_inputs(kind)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, columns, generator=generator) * torch.logspace(-2, 2, 5)[:, None]
    weights = torch.randn(7, columns, generator=generator)
    blocks = blocks_of(weights, kind)
    held = np.zeros((5, row_bytes("F16", 2 * columns)), dtype=np.uint8)  # longer than any type's
    for row, into in zip(values.numpy(), held, strict=True):
        traits_of(traits.inputs).from_float(row.ctypes.data, into.ctypes.data, columns)
    found = np.zeros((5, 7), dtype=np.float32)
    for i, given in enumerate(held):
        for j, weight in enumerate(blocks.numpy()):
            at = found[i, j : j + 1].ctypes.data
            traits.product(columns, at, 0, weight.ctypes.data, 0, given.ctypes.data, 0, 1)
    decoded, inputs = dequantize(blocks, kind), rounded(values, ggml_inputs(kind))
    scale = inputs.double().square().sum(1, keepdim=True).sqrt() * decoded.double().square().sum(1).sqrt()
    error = (torch.from_numpy(found).double() - inputs.double() @ decoded.double().T).abs() / scale
    plain = (torch.from_numpy(found).double() - values.double() @ decoded.double().T).abs() / scale
    assert float(error.max()) < (1e-4 if wanted == "Q8_1" else 2e-5)  # the sums of whose blocks are in half precision
    assert kind in ("F16", "BF16") or float(plain.max()) > 5e-4


def test_inputs_are_rounded_as_another_reader_rounds_them() -> None:
    values = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    values[1, 32:64] = 0
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind), kind))
    assert float((rounded(values, ggml_inputs("Q4_0")) - expected).abs().max()) < 1e-5
    coarse = (rounded(values, ggml_inputs("Q4_K")) - values).abs().amax(1)
    assert bool((coarse > 0).all())
    assert bool((coarse <= values.abs().amax(1) / 254 * 1.001).all())
    assert rounded(values.bfloat16(), "Q8_0").dtype == torch.bfloat16


def test_inputs_of_every_layer_that_has_a_weight_are_rounded() -> None:
    model: Any = tiny_model("llama")
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    InputRounding(model, {"model.layers.0.mlp.up_proj": "Q8_0"})
    given = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for layer, inputs in zip(layers, (rounded(given, "Q8_0"), given, rounded(given, "Q8_0")), strict=True):
            expected = inputs @ layer.mlp.up_proj.weight.T
            torch.testing.assert_close(layer.mlp.up_proj(given), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_losses_are_those_of_plain_passes_with_rounded_inputs(name: str) -> None:
    """Every matrix's, the head's and experts' too, tied or not; the original's inputs are as they come."""
    loaded, text = made(MODELS[name]()), tiny_tokens(4, 32, seed=3)
    levels = Blocks(loaded, ["Q4_0", "Q6_K", "Q5_1", "F16"], "layers|lm_head" if name == "llama" else ".").levels
    assignment = (0,) * len(levels.units)
    inputs = InputTypes.of(None, loaded.model, levels)
    plain = compressed(loaded, levels, assignment).model
    unfuse_experts(plain)
    seen = []
    for module_name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and not module_name.endswith((".gate", ".router")):
            tied = module_name == "lm_head" and loaded.model.config.tie_word_embeddings  # type: ignore[union-attr]
            kind = levels.chosen(assignment)["model.embed_tokens" if tied else module_name].level.label
            module.register_forward_pre_hook(lambda _, args, kind=kind: (rounded(args[0], ggml_inputs(kind)),))
            seen.append(kind)
    assert set(seen) >= {"Q4_0", "Q6_K", "Q5_1", "F16"}
    with torch.inference_mode():
        p, q = (torch.log_softmax(m(input_ids=text).logits[:, :-1].double(), -1) for m in (loaded.model, plain))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    found, without = (
        Evaluator(loaded.model, levels, text, threads=1, inputs=each, dense_bits=32) for each in (inputs, None)
    )
    scored, held_out = found.score([assignment], Minibatch(5, 128))[0], found.evaluate_held_out(assignment, text)
    assert [scored.loss, held_out["loss"]] == pytest.approx([expected, expected], rel=2e-4)
    assert found.evaluate_held_out(None, text)["loss"] < 1e-6
    assert without.score([assignment], Minibatch(5, 128))[0].loss != pytest.approx(expected, rel=1e-3)
    assert found.context() != without.context()
    assert found.identity.keys() - without.identity.keys() == {"arithmetic"}


def test_roundings_follow_the_levels_that_are_switched_to(tmp_path: Path) -> None:
    """Alone or together with others, in any order."""
    loaded = made(MODELS["llama"]())
    levels = levels_of(loaded, ["Q4_0", "Q6_K"], tmp_path / "store").with_dropped()
    inputs, text = InputTypes.of(None, loaded.model, levels), tiny_tokens(4, 32)
    rng = np.random.default_rng(0)
    candidates = [tuple(map(int, rng.integers(0, 3, len(levels.units)))) for _ in range(6)]
    together = Evaluator(loaded.model, levels, text, threads=1, inputs=inputs, early_stopping=False)
    found = [score.loss for score in together.score(candidates, MINIBATCH)]
    for candidate, loss in reversed(list(zip(candidates, found, strict=True))):
        alone = Evaluator(loaded.model, levels, text, threads=1, inputs=inputs)
        assert alone.score([candidate], MINIBATCH)[0].loss == loss


def test_gradients_pass_a_rounding_as_if_it_were_not_there(tmp_path: Path) -> None:
    """Projections are those of autograd through x + (rounded(x) - x) without a gradient of the bracket."""
    loaded, text = made(MODELS["llama"]()), tiny_tokens(2, 32)
    levels = levels_of(loaded, ["Q4_0", "Q6_K"], tmp_path / "store")
    inputs = InputTypes.of(None, loaded.model, levels)
    assignment = tuple(number % 2 for number in range(len(levels.units)))
    sequences = sequences_of(Minibatch(5, 64), 2, 32)
    found = SensitivityPass(loaded.model, levels, text, inputs=inputs).measure(assignment, Minibatch(5, 64), "kl")
    model = compressed(loaded, levels, assignment).model
    kinds = inputs.at(assignment)
    for name, module in model.named_modules():
        if kind := kinds.get(name):

            def hook(_: Any, args: Any, kind: str = kind) -> Any:
                return (args[0] + (rounded(args[0], kind) - args[0]).detach(),)

            module.register_forward_pre_hook(hook)
    weights = {name: model.get_submodule(name).weight for unit in levels.units for name in unit.members}
    for weight in weights.values():
        weight.requires_grad_(True)
    with torch.no_grad():
        p = torch.log_softmax(loaded.model(input_ids=text).logits[:, :-1], -1)
    for sequence, row in enumerate(text):
        q = torch.log_softmax(model(input_ids=row[None]).logits[0, :-1], -1)
        gradients = torch.autograd.grad((p[sequence].exp() * (p[sequence] - q)).sum(), list(weights.values()))  # type: ignore[arg-type]
        for number, (unit, gradient) in enumerate(zip(levels.units, gradients, strict=True)):
            for level in range(2):
                (target,), (place,) = (levels.weights(number, k).values() for k in (level, assignment[number]))
                assert target is not None
                assert place is not None
                told = found.projections[sequences.index(sequence), number, level]
                assert told == pytest.approx(float((gradient * (target - place)).sum()), rel=2e-3, abs=1e-4), unit.name


def test_it_is_of_ggml_types_only() -> None:
    for settings in ({"arithmetic": "cuda", "method": "ggml"}, {"arithmetic": "llama.cpp", "method": "gptq"}):
        with pytest.raises(InvalidSettingError, match=r"must be 'llama.cpp' with method = 'ggml', or empty"):
            LanguageModelTask("m", **{"levels": (), **settings})  # type: ignore[arg-type]
