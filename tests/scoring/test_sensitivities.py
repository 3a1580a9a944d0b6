"""Projections of a backward pass against autograd in float64, finite differences, and what they predict."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.measurements.tiny_architectures import tiny_architecture
from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.levels.levels import Levels
from evo_hpo.models.experts import unfuse_experts
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.head import Chunk
from evo_hpo.scoring.language_model_problem import LanguageModelProblem
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.scoring.sensitivities import SensitivityPass
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.sensitivities import Kind
from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit
from tests.tiny import (
    ARCHITECTURES,
    DropLevels,
    RoundedLevels,
    random_assignments,
    tiny_mixtral,
    tiny_model,
    tiny_tokens,
)

MINIBATCH = Minibatch(seed=5, tokens=60)
SMALL = Chunk(tokens=7, vocabulary=16)


def _plain(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities of the next tokens, float64, of one sequence."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.double(), dim=-1)


def _objective(kind: Kind, model: nn.Module, dense: nn.Module, ids: Tensor) -> Tensor:
    log_q = _plain(model, ids)
    if kind == "true":
        return log_q.gather(1, ids[1:, None]).sum()
    with torch.no_grad():
        log_p = _plain(dense, ids)
    return (log_p.exp() * (log_p - log_q)).sum()


def _placed(model: nn.Module, levels: Levels, assignment: Assignment | None, dtype: torch.dtype) -> nn.Module:
    modules = dict(model.named_modules())
    for unit, level in enumerate(assignment or ()):
        for name, weight in levels.weights(unit, level).items():
            assert weight is not None
            modules[name].weight.data = weight.to(dtype)
    return model


def _by_autograd(
    make: Callable[[], nn.Module], levels: Levels, at: Assignment | None, kind: Kind, dtype: torch.dtype = torch.float64
) -> NDArray[Any]:
    """Full gradients of all weights of a model of this dtype, one sequence after the other."""
    model, dense = _placed(make().to(dtype).requires_grad_(), levels, at, dtype), make().to(dtype)
    modules, tokens = dict(model.named_modules()), tiny_tokens()
    rows = []
    for number in sequences_of(MINIBATCH, len(tokens), tokens.shape[1]):
        model.zero_grad()
        _objective(kind, model, dense, tokens[number]).backward()  # type: ignore[no-untyped-call]
        row = [[0.0] * len(unit.costs) for unit in levels.units]
        for unit, found in enumerate(row):
            for level in range(len(found)):
                for name, target in levels.weights(unit, level).items():
                    weight: Any = modules[name].weight
                    if target is not None and weight.grad is not None:
                        found[level] += float((weight.grad.double() * (target.double() - weight.data.double())).sum())
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("kind", ["true", "kl"])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch", [1, 16])
def test_projections_equal_full_gradients_in_float64(name: str, outer: bool, kind: Kind, batch: int) -> None:
    """Of embedding and head too, where they are units; a matrix that is both has both gradients."""
    model = tiny_model(name)
    levels = RoundedLevels(model, outer=outer)
    at = random_assignments(1, len(levels.units), 3)[0]
    reference = at if kind == "kl" or name in ("llama", "gemma2") else None
    found = SensitivityPass(model, levels, tiny_tokens(), chunk=SMALL, batch=batch).measure(reference, MINIBATCH, kind)
    expected = _by_autograd(lambda: tiny_model(name), levels, reference, kind)
    assert (found.tokens, found.positions) == (180, 11)
    np.testing.assert_allclose(found.projections, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("batch", [1, 16])
def test_squares_are_of_what_a_layer_does_at_neighbouring_positions(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Against the derivative by a change of the layer's weight that is made at some positions only."""
    monkeypatch.setattr("evo_hpo.scoring.projections.PART", 4)
    levels = RoundedLevels(tiny_model("llama"))
    found = SensitivityPass(tiny_model("llama"), levels, tiny_tokens(), batch=batch).measure(None, MINIBATCH, "true")
    assert found.squares is not None
    model, ids = tiny_model("llama").double(), tiny_tokens()[sequences_of(MINIBATCH, 8, 12)[0]]
    for unit in (0, 2, 6):
        ((name, target),) = levels.weights(unit, 0).items()
        module: Any = dict(model.named_modules())[name]
        assert target is not None
        change, slopes = target.double() - module.weight.data, []
        for part in range(3):
            step, mask = torch.zeros((), dtype=torch.float64, requires_grad=True), torch.zeros(12, 1)
            mask[4 * part : 4 * part + 4] = 1.0
            handle = module.register_forward_hook(
                lambda m, given, out, step=step, mask=mask, change=change: out + step * mask * (given[0] @ change.T)
            )
            slopes.append(float(torch.autograd.grad(_objective("true", model, model, ids), step)[0]))
            handle.remove()
        assert found.projections[0, unit, 0] == pytest.approx(sum(slopes), rel=1e-3, abs=1e-6)
        assert found.squares[0, unit, 0] == pytest.approx(sum(x * x for x in slopes), rel=1e-3)


def test_projections_of_experts_belong_to_their_sequences() -> None:
    def make() -> nn.Module:
        model = tiny_mixtral()
        unfuse_experts(model)
        return model

    levels = RoundedLevels(make())
    found = SensitivityPass(make(), levels, tiny_tokens()).measure(None, MINIBATCH, "true")
    expected = _by_autograd(make, levels, None, "true")
    np.testing.assert_allclose(found.projections, expected, atol=2e-4 * np.abs(expected).max())


def _twice(mlp: Any, hidden: Tensor) -> Any:
    once = type(mlp).forward
    return once(mlp, hidden) + once(mlp, 0.5 * hidden)


def test_a_layer_that_runs_twice_counts_twice() -> None:
    def make() -> nn.Module:
        model = tiny_model("llama")
        for name, module in model.named_modules():
            if name.endswith(".mlp"):
                module.forward = MethodType(_twice, module)
        return model

    levels = RoundedLevels(make())
    found = SensitivityPass(make(), levels, tiny_tokens()).measure(None, MINIBATCH, "true")
    expected = _by_autograd(make, levels, None, "true")
    np.testing.assert_allclose(found.projections, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_sampled_labels_give_the_curvature_of_the_divergence(name: str) -> None:
    """Over many draws the mean square is twice the KL of a small change (here a hundredth of one), summed up."""
    model = tiny_model(name)
    rounded, tokens = RoundedLevels(model, bits=(2, 3)), tiny_tokens(sequences=400)
    tokens[:] = tokens[0]
    found = SensitivityPass(model, rounded, tokens, group=400).measure(None, Minibatch(0, 400 * 12))
    share, ids, modules = 0.01, tokens[0], dict(model.double().named_modules())
    with torch.no_grad():
        before = _plain(model, ids)
        for unit in (0, 4, 17):
            expected = []
            for level in range(2):
                ((member, target),) = rounded.weights(unit, level).items()
                weight: Any = modules[member].weight
                original = weight.data
                assert target is not None
                weight.data = original + share * (target.double() - original)
                expected.append(float((before.exp() * (before - _plain(model, ids))).sum()) / share**2 / 11)
                weight.data = original
            error = np.sqrt(found.noise()[unit])
            assert np.all(np.abs(found.effects()[unit] - expected) < 4 * error + 0.02 * np.array(expected))
            assert np.all(error < 0.15 * found.effects()[unit])


@pytest.mark.parametrize("kinds", [("attention", "mlp"), ("block",), ("pair",)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "falcon"])
@pytest.mark.parametrize("dropped", [(), (1,), (0, 2, 4)])
def test_modules_that_are_switched_off_or_on(name: str, kinds: Sequence[str], dropped: Sequence[int]) -> None:
    """The derivative with respect to a factor on the module's contribution, by autograd in a float64 model.

    Bloom's modules have the residual as their second argument and add it themselves; Falcon's blocks add the attention
    to what the MLP gave, in place.
    """
    made = tiny_architecture if name in ("bloom", "falcon") else tiny_model
    model, tokens = made(name), tiny_tokens()
    levels = DropLevels(model, kinds)
    at = tuple(0 if unit in dropped else 1 for unit in range(len(levels.units)))
    if not any(at):
        return
    found = SensitivityPass(model, levels, tokens).measure(at, MINIBATCH, "true")
    plain = made(name).double()
    modules = dict(plain.named_modules())
    residual = 0 if kinds[0] in ("block", "pair") else 1 if name == "bloom" else None
    factors = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    for unit, own in enumerate(levels.units):
        for member in own.members:
            modules[member].register_forward_hook(_scaled(factors[unit], residual), with_kwargs=True)
    for row, number in zip(found.projections, sequences_of(MINIBATCH, len(tokens), tokens.shape[1]), strict=True):
        (slopes,) = torch.autograd.grad(_objective("true", plain, plain, tokens[number]), factors)
        expected = np.zeros((len(at), 2))
        for unit, level in enumerate(at):
            expected[unit, 1 - level] = float(slopes[unit]) * (1 - 2 * level)
        np.testing.assert_allclose(row, expected, atol=2e-4 * np.abs(expected).max())


def _scaled(factor: Tensor, residual: int | None) -> Callable[..., Any]:
    """A hook that multiplies what a module contributes; ``residual``: the argument that its output has in it."""

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        base = 0.0 if residual is None else args[residual] if args else kwargs["hidden_states"]
        first = base + factor * (first - base)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    return hook


class _LinearsToDrop:
    """Linear layers that are rounded, or contribute nothing, bias included."""

    fingerprint = "rounded or dropped"

    def __init__(self, model: nn.Module) -> None:
        self._rounded = RoundedLevels(model, bits=(3,))
        self.units = [Unit(u.name, (0, 3), size=u.size) for u in self._rounded.units]

    def weights(self, unit: int, level: int) -> dict[str, Tensor | None]:
        return dict(self._rounded.weights(unit, 0)) if level else {self.units[unit].name: None}


def test_a_linear_layer_that_is_dropped_takes_its_bias_along() -> None:
    model, tokens = tiny_model("qwen2"), tiny_tokens()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.fill_(0.3)
    levels = _LinearsToDrop(model)
    at = tuple(0 if unit in (2, 6, 9) else 1 for unit in range(len(levels.units)))
    found = SensitivityPass(model, levels, tokens).measure(at, MINIBATCH, "true")
    plain = copy.deepcopy(model).double()
    modules = dict(plain.named_modules())
    factors = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    for unit, own in enumerate(levels.units):
        modules[own.name].weight.data = levels.weights(unit, 1)[own.name].double()  # type: ignore[union-attr]
        modules[own.name].register_forward_hook(_scaled(factors[unit], None), with_kwargs=True)
    for row, number in zip(found.projections, sequences_of(MINIBATCH, len(tokens), tokens.shape[1]), strict=True):
        (slopes,) = torch.autograd.grad(_objective("true", plain, plain, tokens[number]), factors)
        expected = np.zeros((len(at), 2))
        for unit, level in enumerate(at):
            expected[unit, 1 - level] = float(slopes[unit]) * (1 - 2 * level)
        np.testing.assert_allclose(row, expected, atol=2e-4 * np.abs(expected).max())


def test_a_bfloat16_model_errs_no_more_than_its_own_gradients_do() -> None:
    def half() -> nn.Module:
        return tiny_model("llama").to(torch.bfloat16)

    model, rounded = half(), RoundedLevels(half())
    found = SensitivityPass(model, rounded, tiny_tokens()).measure(None, MINIBATCH, "true").projections
    exact = _by_autograd(half, rounded, None, "true")
    plain = _by_autograd(half, rounded, None, "true", torch.bfloat16)
    assert np.linalg.norm(found - exact) < 1.2 * np.linalg.norm(plain - exact) < 0.5 * np.linalg.norm(exact)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_problem_measures_them_after_scoring_and_leaves_losses_as_they_are(threads: int) -> None:
    model = tiny_model("llama")
    levels, tokens = RoundedLevels(model), tiny_tokens()
    space = CompressionSpace.from_average(levels.units, 4)
    evaluator = Evaluator(model, levels, tokens, threads=threads)
    problem = LanguageModelProblem(evaluator, space, tokens[:2], tokens=24, name="tiny")
    levels_before = space.uniform()
    before = problem.score([levels_before], MINIBATCH)
    found = problem.sensitivities(levels_before, MINIBATCH, kind="kl")
    assert len(problem._gradients._replicas) == threads
    expected = _by_autograd(lambda: tiny_model("llama"), levels, levels_before, "kl")
    np.testing.assert_allclose(found.projections, expected, atol=2e-4 * np.abs(expected).max())
    evaluator.cache.close()
    fresh = LanguageModelProblem(Evaluator(model, levels, tokens, threads=1), space, tokens[:2], tokens=24, name="t")
    assert fresh.score([levels_before], MINIBATCH) == before
    assert problem.has_sensitivities


def test_layers_that_share_a_weight_are_refused() -> None:
    """Each has a gradient of its own; a head that is the embedding is no such layer."""
    model: Any = tiny_model("qwen2")
    SensitivityPass(model, RoundedLevels(model, outer=True), tiny_tokens())
    first, _, third = model.model.layers
    third.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"2 layers share the weight of 'model.layers.0.mlp.up_proj'"):
        SensitivityPass(model, RoundedLevels(model), tiny_tokens())


def test_refusals() -> None:
    model = tiny_model("llama")
    sensitivities = SensitivityPass(model, RoundedLevels(model), tiny_tokens())
    with pytest.raises(InvalidSettingError, match="kind='other' must be one of: sampled, true, kl"):
        sensitivities.measure(None, MINIBATCH, "other")  # type: ignore[arg-type]
    with pytest.raises(InvalidSettingError, match="uncompressed model: its gradient is zero"):
        sensitivities.measure(None, MINIBATCH, "kl")
    with pytest.raises(InvalidSettingError, match="whole number of sequences"):
        sensitivities.measure(None, Minibatch(0, 13))
