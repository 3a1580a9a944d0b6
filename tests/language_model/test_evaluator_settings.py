"""Cached scores, measured settings and compilation: what they keep, and that bits stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evo_hpo.language_model import compiling
from evo_hpo.language_model.tuning import fastest_dtype
from evo_hpo.language_model.worker import Worker
from evo_hpo.problem import Minibatch
from tests.language_model.evaluators import LARGE, LENGTH, SMALL, Parts, losses_of, make_evaluator
from tests.language_model.tiny import random_assignments


def test_nothing_is_paid_for_twice(llama: Parts, tmp_path: Path) -> None:
    candidates = random_assignments(3, len(llama[1].units), 3)
    first, second = (make_evaluator(llama, cache=tmp_path / "scores.db") for _ in range(2))
    losses = losses_of(first, candidates)
    assert losses_of(second, candidates) == losses
    assert second.counts["cached"] == 3
    assert second.counts["tokens"] == 0
    exported = {(a, m): s for a, m, s in second.cache.export()}
    assert set(exported) == {(c, LARGE) for c in candidates}
    assert exported[candidates[0], LARGE].mean() / (LENGTH - 1) == pytest.approx(losses[0], rel=1e-12)
    other = make_evaluator(llama, cache=tmp_path / "scores.db", fitness="perplexity")
    assert losses_of(other, candidates) != losses


def test_measured_settings_are_kept_so_that_bits_stay(llama: Parts, tmp_path: Path) -> None:
    first, second = (make_evaluator(llama, cache=tmp_path / "scores.db", measure=True, threads=None) for _ in range(2))
    names = ("batch_size", "chunk", "threads")
    assert [first.report()[n] for n in names] == [second.report()[n] for n in names]
    assert any(what.startswith("chunk") and rate > 0 for what, rate in first.report()["measured"])
    assert not second.report()["measured"]
    candidates = random_assignments(3, len(llama[1].units), 3)
    np.testing.assert_allclose(losses_of(second, candidates), losses_of(make_evaluator(llama), candidates), rtol=1e-6)


def test_the_compute_dtype_is_one_that_this_machine_multiplies_fast() -> None:
    assert fastest_dtype() in (torch.float32, torch.bfloat16)


@pytest.mark.filterwarnings("ignore")
def test_without_a_compiler_the_blocks_stay_eager(
    llama: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no working C++ compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", no_compiler)
    evaluator = make_evaluator(llama, compile=True)
    assert evaluator.report()["compiled"] == ()
    assert caplog.messages == [
        f"{part} are not compiled: RuntimeError: no working C++ compiler"
        for part in ("decoder blocks", "chunks of logits")
    ]
    candidates = random_assignments(2, len(llama[1].units), 3)
    assert losses_of(evaluator, candidates) == losses_of(make_evaluator(llama), candidates)


class _Clock:
    """Says that what is compiled takes ``factor`` times as long; the runs before it are the eager ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
        self.factor, self.runs = factor, dict[Any, int]()
        monkeypatch.setattr(torch, "compile", lambda code, **_: code)
        monkeypatch.setattr(compiling, "_seconds", self.seconds)

    def seconds(self, _: Worker, work: Any, __: Tensor) -> float:
        self.runs[work] = self.runs.get(work, 0) + 1
        return 1.0 if self.runs[work] <= compiling.REPEATS else self.factor


@pytest.mark.parametrize(("factor", "kept"), [(0.5, ("blocks", "chunk")), (0.99, ())])
def test_what_is_compiled_is_kept_where_it_is_faster_and_the_decision_stays(
    llama: Parts,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    factor: float,
    kept: tuple[str, ...],
) -> None:
    for time in (factor, 1 / factor):  # the second time, the clock says the opposite
        _Clock(monkeypatch, time)
        evaluator = make_evaluator(llama, compile=True, cache=tmp_path / "scores.db")
        assert evaluator.report()["compiled"] == kept


# ---------------------------------------------------------------------- packed weights


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="weights are packed by MKL")  # type: ignore[no-untyped-call]
@pytest.mark.parametrize("batch_size", [1, 2])
def test_packed_weights_give_the_losses_of_plain_ones(llama: Parts, batch_size: int) -> None:
    candidates = random_assignments(8, len(llama[1].units), 3)
    plain, packed = (make_evaluator(llama, batch_size=batch_size, packed_bytes=b) for b in (0, 1 << 20))
    for minibatch in (LARGE, SMALL, Minibatch(6, LARGE.tokens)):
        expected = losses_of(plain, candidates, minibatch)
        np.testing.assert_allclose(losses_of(packed, candidates, minibatch), expected, rtol=1e-6)
    kept = packed.pool.workers[0].switch.packed
    assert kept.rows == batch_size * LENGTH
    assert len(kept) == len(llama[1].units)
    assert not len(plain.pool.workers[0].switch.packed)


def test_weights_that_do_not_fit_stay_as_they_are(llama: Parts) -> None:
    candidates = random_assignments(4, len(llama[1].units), 3)
    few = make_evaluator(llama, packed_bytes=10_000)  # a layer of 32 x 32 numbers takes 4096 bytes
    np.testing.assert_allclose(losses_of(few, candidates), losses_of(make_evaluator(llama), candidates), rtol=1e-6)
    assert 0 < len(few.pool.workers[0].switch.packed) <= 4
