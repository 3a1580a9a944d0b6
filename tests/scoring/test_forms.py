"""Other forms of sensitivities against full gradients in float64, text of the model's own, and layer-wise errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.levels import Levels
from evo_hpo.models.text import sample_from_model
from evo_hpo.scoring import devices, weight_changes
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.language_model_problem import LanguageModelProblem
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.scoring.sensitivities import SensitivityPass
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.sensitivities import Form
from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit
from tests.tiny import DropLevels, RoundedLevels, random_assignments, tiny_model, tiny_tokens

MINIBATCH = Minibatch(seed=5, tokens=60)


def _weight(module: nn.Module) -> nn.Parameter:
    assert isinstance(module.weight, nn.Parameter)
    return module.weight


def _directly(
    name: str, levels: Levels, at: Assignment | None, form: Form, text: Tensor | None = None
) -> NDArray[np.float64]:
    """From all gradients of weights and of outputs of a float64 model, one sequence after the other."""
    model = tiny_model(name).double().requires_grad_()
    modules = {n: m for n, m in model.named_modules() if any(n in u.members for u in levels.units)}
    original = {n: _weight(m).detach().clone() for n, m in modules.items()}
    for unit, level in enumerate(at or ()):
        for member, weight in levels.weights(unit, level).items():
            assert weight is not None
            _weight(modules[member]).data = weight.double()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            output.retain_grad()
            seen[name] = (args[0].detach(), output)

        return see

    for member, module in modules.items():
        module.register_forward_hook(hook(member))
    tokens = tiny_tokens()
    if text is None:
        text = tokens[list(sequences_of(MINIBATCH, len(tokens), tokens.shape[1]))]
    rows = []
    for ids in text:
        model.zero_grad()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None]).sum().backward()  # type: ignore[no-untyped-call]
        row = [[0.0] * len(unit.costs) for unit in levels.units]
        for unit, found in enumerate(row):
            for level in range(len(found)):
                for member, target in levels.weights(unit, level).items():
                    weight, (given, output) = _weight(modules[member]), seen[member]
                    assert target is not None
                    assert weight.grad is not None
                    assert output.grad is not None
                    change = target.double() - weight.data
                    if form == "inner":
                        found[level] += float((weight.grad * change).sum())
                    elif form == "absolute":
                        found[level] += float((weight.grad * (target.double() - original[member])).abs().sum())
                    elif form == "trace":
                        found[level] += float(weight.grad.square().sum() * change.square().sum()) / change.numel()
                    else:
                        taken = isinstance(modules[member], nn.Embedding)
                        moved = change[given] if taken else given @ (change if name == "gpt2" else change.T)
                        found[level] += float((output.grad * moved).square().sum())
        rows.append(row)
    values = np.array(rows)
    return np.sqrt(values) if form in ("output", "trace") else values


class Tied:
    """Units of two layers each."""

    def __init__(self, levels: RoundedLevels) -> None:
        self.levels, self.fingerprint = levels, "tied"
        pairs = zip(levels.units[::2], levels.units[1::2], strict=False)
        self.units = [
            Unit(a.name, tuple(x + y for x, y in zip(a.costs, b.costs, strict=True)), members=(*a.members, *b.members))  # type: ignore[operator]
            for a, b in pairs
        ]

    def weights(self, unit: int, level: int) -> dict[str, Tensor | None]:
        return {**self.levels.weights(2 * unit, level), **self.levels.weights(2 * unit + 1, level)}


@pytest.mark.parametrize("form", ["absolute", "output", "trace"])
@pytest.mark.parametrize(
    ("name", "placed", "outer"),
    [("llama", True, True), ("llama", False, False), ("gpt2", True, False), ("qwen2", False, False)],
)
@pytest.mark.parametrize("batch", [1, 16])
def test_forms_equal_what_full_gradients_give_in_float64(
    name: str, placed: bool, outer: bool, form: Form, batch: int
) -> None:
    model = tiny_model(name)
    levels = RoundedLevels(model, outer=outer)
    at = random_assignments(1, len(levels.units), 3)[0] if placed else None
    found = SensitivityPass(model, levels, tiny_tokens(), batch=batch).measure(at, MINIBATCH, "true", form)
    expected = _directly(name, levels, at, form)
    assert (found.form, found.tokens) == (form, 180)
    np.testing.assert_allclose(found.projections, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["inner", "absolute", "output", "trace"])
def test_layers_of_one_unit_add_up(form: Form) -> None:
    model = tiny_model("llama")
    tied = Tied(RoundedLevels(model))
    found = SensitivityPass(model, tied, tiny_tokens()).measure(None, MINIBATCH, "true", form)
    expected = _directly("llama", tied, None, form)
    np.testing.assert_allclose(found.projections, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["inner", "absolute", "output", "trace"])
@pytest.mark.parametrize("batch", [2, 16])
def test_blocks_of_rows_and_of_sequences_add_up(monkeypatch: pytest.MonkeyPatch, form: Form, batch: int) -> None:
    monkeypatch.setattr("evo_hpo.scoring.weight_changes.ELEMENTS", 64)
    monkeypatch.setattr("evo_hpo.scoring.weight_changes.SEQUENCES", 2)
    monkeypatch.setattr("evo_hpo.scoring.projections.PART", 4)
    model = tiny_model("llama")
    levels = RoundedLevels(model)
    found = SensitivityPass(model, levels, tiny_tokens(), batch=batch).measure(None, MINIBATCH, "true", form)
    expected = _directly("llama", levels, None, form)
    np.testing.assert_allclose(found.projections, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["inner", "absolute", "output", "trace"])
@pytest.mark.parametrize(("elements", "longest"), [(256, 64), (1 << 20, 1 << 10), (1 << 27, 1 << 20)])
def test_rows_as_a_gpu_takes_them_add_up(
    monkeypatch: pytest.MonkeyPatch, form: Form, elements: int, longest: int
) -> None:
    monkeypatch.setattr(devices, "has_small_caches", lambda _: False)
    monkeypatch.setattr(weight_changes, "ELEMENTS_ELSEWHERE", elements)
    monkeypatch.setattr(weight_changes, "LONGEST", longest)
    model = tiny_model("llama")
    levels = RoundedLevels(model)
    found = SensitivityPass(model, levels, tiny_tokens(), batch=16).measure(None, MINIBATCH, "true", form)
    expected = _directly("llama", levels, None, form)
    np.testing.assert_allclose(found.projections, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("place", [True, False])
@pytest.mark.parametrize("form", ["inner", "absolute", "output", "trace"])
def test_a_gpu_takes_what_is_dropped_alike(monkeypatch: pytest.MonkeyPatch, form: Form, place: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    seen = [(drawn(6, 9, 12), drawn(6, 9, 20))]
    targets = [drawn(12, 20), None, drawn(12, 20)]
    at = drawn(12, 20) if place else None

    def found() -> torch.Tensor:
        if form == "output":
            return weight_changes.output_changes(seen, at, targets, None, False)
        return weight_changes.weight_changes(seen, at, targets, form)

    monkeypatch.setattr(devices, "has_matrix_units", lambda _: False)
    expected = found()
    largest = float(expected.abs().max())
    monkeypatch.setattr(devices, "has_small_caches", lambda _: False)
    torch.testing.assert_close(found().double(), expected, rtol=1e-5, atol=1e-5 * largest)
    assert (expected[:, 1] != 0).all() == place
    monkeypatch.setattr(devices, "has_matrix_units", lambda _: True)
    for small_caches in (True, False):
        monkeypatch.setattr(devices, "has_small_caches", lambda _, own=small_caches: own)
        torch.testing.assert_close(found().double(), expected, rtol=1e-2, atol=1e-2 * largest)  # 16 bits


def test_memory_of_a_gpu_is_bounded_whatever_the_layer() -> None:
    for together, columns in ((1, 14336), (128, 576), (1024, 14336), (1 << 15, 1 << 15)):
        step = weight_changes._rows_at_a_time(torch.device("cuda"), together, columns)
        assert step >= 1
        assert step == 1 or together * step * columns <= weight_changes.ELEMENTS_ELSEWHERE
        assert step == 1 or step * columns <= weight_changes.LONGEST


def test_what_is_dropped_takes_its_output_along() -> None:
    """Elementwise products of a module's output and its gradient: their sum, and no less than that in size."""
    model = tiny_model("llama")
    levels = DropLevels(model)
    measure = SensitivityPass(model, levels, tiny_tokens()).measure
    found = {form: measure(None, MINIBATCH, "true", form).projections for form in ("inner", "absolute", "output")}
    assert (found["absolute"][:, :, 0] >= np.abs(found["inner"][:, :, 0])).all()
    assert (found["absolute"][:, :, 0] >= found["output"][:, :, 0]).all()
    assert (found["output"] >= 0).all()
    assert all((f[:, :, 1] == 0).all() for f in found.values())
    at = (0,) + (1,) * (len(levels.units) - 1)
    kept = measure(at, MINIBATCH, "true", "output").projections[:, 0]
    assert (kept[:, 0] == 0).all()
    assert (kept[:, 1] > 0).all()


def test_own_text_is_sampled_from_the_uncompressed_model() -> None:
    """The same text whatever was measured before, and its labels' gradients as computed directly."""
    model = tiny_model("llama")
    levels = RoundedLevels(model)
    measure = SensitivityPass(model, levels, tiny_tokens()).measure
    generated = Minibatch(seed=5, tokens=60, generated=True)
    measure(random_assignments(1, len(levels.units), 3)[0], MINIBATCH, "kl")
    found = measure(None, generated, "true")
    text = sample_from_model(tiny_model("llama"), 5, 12, seed=5)
    assert found.tokens == 4 * 60
    expected = _directly("llama", levels, None, "inner", text)
    np.testing.assert_allclose(found.projections, expected, atol=2e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(measure(None, generated, "true").projections, found.projections)


def _problem(**more: Any) -> LanguageModelProblem:
    model, tokens = tiny_model("llama"), tiny_tokens()
    levels = RoundedLevels(model)
    evaluator = Evaluator(model, levels, tokens, threads=1)
    space = CompressionSpace.from_average(levels.units, 4)
    return LanguageModelProblem(evaluator, space, tokens[:2], tokens=24, name="tiny", **more)


def test_layer_wise_errors_are_those_that_the_levels_came_with() -> None:
    errors = [[0.5, 0.1, 0.0]] * 20 + [[0.25, 0.0]]
    found = _problem(errors=errors).sensitivities(None, Minibatch(0, 24), kind="layerwise")
    assert found.tokens == 0
    np.testing.assert_allclose(found.effects()[:20], np.tile([0.5, 0.1, 0.0], (20, 1)), rtol=1e-6)
    assert np.isnan(found.effects()[20, 2])
    with pytest.raises(InvalidSettingError, match="problem 'tiny' knows no layer-wise errors"):
        _problem().sensitivities(None, Minibatch(0, 24), kind="layerwise")
