"""Layers of one shape, taken together as on a GPU: the sums are those of the weight gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evo_hpo.levels.levels import Levels
from evo_hpo.scoring import devices, projections, weight_changes
from evo_hpo.scoring.layers_together import LayersTogether, Visit, are_taken_together
from evo_hpo.scoring.sensitivities import SensitivityPass
from evo_hpo.search.problem import Minibatch
from tests.scoring.test_forms import Tied
from tests.tiny import DropLevels, RoundedLevels, random_assignments, tiny_model, tiny_tokens

MINIBATCH = Minibatch(seed=5, tokens=60)
SEQUENCES, LENGTH = 4, 7


def visits(shape: tuple[int, int], levels: int, count: int, first: int = 0) -> list[Visit]:
    """Of so many layers of rows x columns."""
    generator = torch.Generator().manual_seed(first)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    rows, columns = shape
    return [
        Visit(
            first + number,
            drawn(SEQUENCES, LENGTH, rows),
            drawn(SEQUENCES, LENGTH, columns),
            drawn(rows, columns),
            [drawn(rows, columns) for _ in range(levels)],
        )
        for number in range(count)
    ]


def by_gradients(visit: Visit, parts: int) -> Tensor:
    """Part by part, in double precision, from the weight gradients of each part."""
    each = -(-LENGTH // parts)
    rows = []
    for left, right in zip(visit.left.double(), visit.right.double(), strict=True):
        for part in range(parts):
            some = slice(part * each, (part + 1) * each)
            gradient = left[some].T @ right[some]
            rows.append([float((gradient * (t.double() - visit.place.double())).sum()) for t in visit.targets])
    return torch.tensor(rows)


@pytest.mark.parametrize("products", [5, 1 << 15])
@pytest.mark.parametrize("outputs", [1, 700, 1 << 27])
@pytest.mark.parametrize("parts", [1, 3])
def test_sums_are_those_of_the_gradients(
    monkeypatch: pytest.MonkeyPatch, outputs: int, parts: int, products: int
) -> None:
    """Of layers of three kinds; few rows of one at a time, a whole layer at a time, or all that are alike."""
    monkeypatch.setattr(devices, "has_small_caches", lambda _: False)
    monkeypatch.setattr(weight_changes, "OUTPUTS", outputs)
    monkeypatch.setattr(weight_changes, "PRODUCTS", products)
    every = [*visits((6, 5), 3, 4), *visits((5, 6), 3, 2, 4), *visits((6, 5), 2, 1, 6)]
    together = LayersTogether(parts)
    for visit in every:
        together.add([visit])
    found = {unit: own for units, sums in together.take() for unit, own in zip(units, sums, strict=True)}
    assert sorted(found) == list(range(7))
    for visit in every:
        expected = by_gradients(visit, parts).float()
        torch.testing.assert_close(found[visit.unit], expected, rtol=1e-4, atol=1e-4)
    assert not list(together.take())


def test_one_alone_may_lie_in_memory_in_any_order() -> None:
    """A gradient that comes from transposed heads, or the same for all positions."""
    (plain,) = visits((6, 5), 3, 1)
    left = plain.left.transpose(0, 1).contiguous().transpose(0, 1)
    own = replace(plain, left=left, right=plain.right[:, :1].expand(plain.right.shape))
    together = LayersTogether(7)
    together.add([own])
    ((_, sums),) = together.take()
    torch.testing.assert_close(sums[0], by_gradients(own, 7).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outputs", [1, 100, 1000, 5000])
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, outputs: int) -> None:
    """Moved outputs and changed weights: one row's at least, a layer's at most where those of two are too many."""
    monkeypatch.setattr(devices, "has_small_caches", lambda _: False)
    monkeypatch.setattr(weight_changes, "OUTPUTS", outputs)
    sizes = []
    bmm = torch.bmm

    def noted(left: Tensor, right: Tensor) -> Tensor:
        found = bmm(left, right)
        sizes.append((found.numel(), right.numel()))
        return found

    monkeypatch.setattr(torch, "bmm", noted)
    together = LayersTogether(1)
    together.add(visits((6, 5), 3, 4))
    list(together.take())
    row = 3 * SEQUENCES * LENGTH
    assert max(max(pair) for pair in sizes) <= max(outputs, row)


def test_what_waits_is_bounded() -> None:
    one = visits((6, 5), 3, 1)
    size = sum(each.nbytes for each in (one[0].left, one[0].right, *one[0].targets))
    together = LayersTogether(1, 2 * size)
    full = []
    for _ in range(3):
        together.add(one)
        full.append(together.are_full)
    assert full == [False, False, True]
    list(together.take())
    assert not together.are_full


def test_only_16_bits_elsewhere_than_on_a_cpu() -> None:
    values = torch.zeros(1)
    assert not are_taken_together(values.bfloat16())
    assert are_taken_together(values.bfloat16().to("meta"))
    assert not are_taken_together(values.to("meta"))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch, taken_together: list[int]) -> list[int]:
    """As on a GPU, in whatever precision; how many layers were taken together each time."""
    monkeypatch.setattr(weight_changes, "OUTPUTS_ON_A_CPU", 1 << 27)
    monkeypatch.setattr(projections, "are_taken_together", lambda _: True)
    return taken_together


class Switched:
    """Levels, the first of which switches a layer off."""

    def __init__(self, levels: RoundedLevels) -> None:
        self._levels, self.units, self.fingerprint = levels, levels.units, levels.fingerprint

    def weights(self, unit: int, level: int) -> dict[str, Tensor | None]:
        """See `Levels`."""
        found = dict(self._levels.weights(unit, level))
        return found if level else dict.fromkeys(found)


def made(name: str) -> tuple[nn.Module, Levels]:
    model = tiny_model("llama" if name in ("dropped", "tied", "outer", "switched") else name)
    if name == "switched":
        return model, Switched(RoundedLevels(model))
    if name == "dropped":
        return model, DropLevels(model, ["attention", "mlp", "block"])
    return model, Tied(RoundedLevels(model)) if name == "tied" else RoundedLevels(model, outer=name == "outer")


@pytest.mark.parametrize("most_bytes", [0, 1 << 28])
@pytest.mark.parametrize("kind", ["true", "kl"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "cohere", "tied", "outer", "switched", "dropped"])
def test_a_pass_finds_what_one_on_a_cpu_does(
    monkeypatch: pytest.MonkeyPatch, taken: list[int], name: str, kind: Any, most_bytes: int
) -> None:
    monkeypatch.setattr(projections, "PART", 4)
    monkeypatch.setattr(projections, "WAITING_BYTES", most_bytes)
    model, levels = made(name)
    at = random_assignments(1, len(levels.units), 2)[0] if kind == "kl" else None
    found = SensitivityPass(model, levels, tiny_tokens(), batch=16).measure(at, MINIBATCH, kind)
    assert bool(taken) == (name not in ("switched", "dropped"))
    if name == "llama":
        assert (max(taken) > 2) == bool(most_bytes)  # of more than one block, where they may wait
    with monkeypatch.context() as patch:
        patch.setattr(projections, "are_taken_together", lambda _: False)
        expected = SensitivityPass(model, levels, tiny_tokens(), batch=16).measure(at, MINIBATCH, kind)
    scale = np.nanmax(np.abs(expected.projections))
    np.testing.assert_allclose(found.projections, expected.projections, rtol=1e-3, atol=1e-5 * scale)
    if expected.squares is not None:
        assert found.squares is not None
        np.testing.assert_allclose(found.squares, expected.squares, rtol=1e-3, atol=1e-5 * scale**2)


def test_runs_of_some_sequences_are_not_taken_together(taken: list[int]) -> None:
    model, levels = made("llama")
    SensitivityPass(model, levels, tiny_tokens(), batch=2).measure(None, MINIBATCH)
    assert not taken


def test_a_pass_that_failed_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, taken: list[int]) -> None:
    model, levels = made("llama")
    own = SensitivityPass(model, levels, tiny_tokens(), batch=16)
    expected = own.measure(None, MINIBATCH).projections
    add = LayersTogether.add

    def failing(together: LayersTogether, some: list[Visit]) -> None:
        add(together, some)
        if some[0].unit == 2:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(LayersTogether, "add", failing)
        with pytest.raises(MemoryError):
            own.measure(None, MINIBATCH)
    assert not own._replicas[0]._projector._together._visits
    np.testing.assert_array_equal(own.measure(None, MINIBATCH).projections, expected)
