"""Attention in compiled blocks: the same as in float64, and put in place of nothing but plain causal attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo import lookup_backend
from torch.nn import functional

from evo_hpo.scoring.attention import causal_attention, compile_with_attention


def _inputs(
    length: int = 128, groups: int = 2, dtype: torch.dtype = torch.bfloat16, width: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 6 heads and their keys and values, 3 sequences, in the layout that projections give."""
    generator = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(3, length, heads, size, generator=generator).mul(2).to(dtype).transpose(1, 2)
        for heads, size in ((6, 16), (groups, 16), (groups, width))
    )


def _exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    share = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(share, dim=1) for x in (key, value))
    scores = (query.double() @ key.transpose(-1, -2)) * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 100, 256])
def test_it_is_softmax_attention_on_what_came_before(length: int, groups: int, scale: float | None) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        query, key, value = _inputs(length, groups, dtype, width=8)
        found, exact = causal_attention(query, key, value, scale), _exact(query, key, value, scale or 0.25)
        assert found.dtype == dtype
        assert found.shape == exact.shape
        assert float((found.double() - exact).norm()) < tolerance * float(exact.norm())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Traced and split into operators as for inductor, but not translated to C++; with the code of each graph."""
    seen: list[str] = []

    def traced(graph: fx.GraphModule, inputs: Any) -> Any:
        seen.append(graph.code)
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda _: traced)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    torch._dynamo.reset()
    return seen


def _run(work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = torch.compile(work, dynamic=False, backend=compile_with_attention)(*inputs)
    return found


_kernel = functional.scaled_dot_product_attention


def test_it_takes_the_place_of_the_kernel(graphs: list[str]) -> None:
    def work(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _kernel(query, key, value, scale=0.5, is_causal=True, enable_gqa=True) + 1

    inputs = _inputs()
    found = _run(work, *inputs)
    assert len(graphs) == 1
    assert "causal_attention" in graphs[0]
    assert "_nn.scaled_dot_product" not in graphs[0]
    assert torch.equal(found, causal_attention(*inputs, 0.5) + 1)
    assert float((found - work(*inputs)).norm()) < 5e-3 * float(found.norm())


@pytest.mark.parametrize(
    ("work", "inputs"),
    [
        (lambda q, k, v: _kernel(q, k, v, enable_gqa=True), _inputs()),
        (lambda q, k, v: _kernel(q, k, v, is_causal=True, enable_gqa=True), _inputs(dtype=torch.float32)),
        (lambda q, k, v: _kernel(q, k, v, is_causal=True, enable_gqa=True), _inputs(length=64)),
        (lambda q, k, v: _kernel(q[:, :, :100], k, v, is_causal=True, enable_gqa=True), _inputs()),
        (lambda q, k, v: _kernel(q, k, v, None, 0.0, True, enable_gqa=True), _inputs()),
        (
            lambda q, k, v: _kernel(q, k, v, torch.ones(128, 128, dtype=torch.bool).tril(3), enable_gqa=True),
            _inputs(),
        ),
    ],
    ids=["sees all", "float32", "short", "fewer queries than keys", "by position", "mask"],
)
def test_what_is_no_plain_causal_attention_stays(
    work: Callable[..., Tensor], inputs: tuple[Tensor, ...], graphs: list[str]
) -> None:
    assert torch.equal(_run(work, *inputs), work(*inputs))
    assert ["_nn.scaled_dot_product" in graph for graph in graphs] == [True]
    assert "causal_attention" not in graphs[0]
