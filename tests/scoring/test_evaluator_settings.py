"""Cached scores, measured settings and compilation: what they keep, and that bits stay."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from evo_hpo.models.experts import unfuse_experts
from evo_hpo.scoring import compiling, prepacking
from evo_hpo.scoring import evaluator as evaluator_module
from evo_hpo.scoring.compile_lock import COMPILE_LOCK
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.head import Chunk
from evo_hpo.scoring.replica import Replica
from evo_hpo.scoring.tuning import Tuned, fastest_dtype
from evo_hpo.search.problem import Minibatch
from tests.scoring.evaluators import LARGE, LENGTH, SMALL, Parts, losses_of, make_evaluator
from tests.tiny import (
    VOCABULARY,
    RoundedLevels,
    random_assignments,
    random_model,
    tiny_mixtral,
    tiny_model,
    tiny_tokens,
)


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


def test_what_was_scored_before_decides_not_who_is_stopped(llama: Parts, tmp_path: Path) -> None:
    units = len(llama[1].units)
    candidates = [tuple([k] * i + [2] * (units - i)) for k in (0, 1) for i in (1, 5, 9, 14)]
    fresh = make_evaluator(llama).score(candidates, LARGE, keep=2)
    assert any(score.stopped for score in fresh)
    for number, known in enumerate((candidates[:4], candidates[4:], candidates)):
        used = make_evaluator(llama, cache=tmp_path / f"{number}.db")
        losses_of(used, known)
        losses_of(used, candidates[2:6], SMALL)
        before = dict(used.counts)
        assert used.score(candidates, LARGE, keep=2) == fresh
        assert used.counts["cached"] - before["cached"] == len(known)
        assert used.counts["candidates"] - before["candidates"] == len(candidates) - len(known)
    read = used.counts["tokens"]
    assert used.score(candidates, LARGE, keep=2) == fresh
    assert used.counts["tokens"] == read


def test_measured_settings_are_kept_so_that_bits_stay(llama: Parts, tmp_path: Path) -> None:
    first, second = (make_evaluator(llama, cache=tmp_path / "scores.db", measure=True, threads=None) for _ in range(2))
    names = ("batch_size", "chunk", "threads")
    assert [first.report()[n] for n in names] == [second.report()[n] for n in names]
    assert any(what.startswith("chunk") and rate > 0 for what, rate in first.report()["measured"])
    assert not second.report()["measured"]
    candidates = random_assignments(3, len(llama[1].units), 3)
    np.testing.assert_allclose(losses_of(second, candidates), losses_of(make_evaluator(llama), candidates), rtol=1e-6)


def test_measured_threads_are_those_that_score(llama: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Tuned(batch_size=2, chunk=Chunk(8, 16), threads=2, rows=())
    monkeypatch.setattr(evaluator_module, "measure_settings", lambda *_: found)
    monkeypatch.setattr(evaluator_module, "cores", lambda: 3)
    evaluator = make_evaluator(llama, measure=True, threads=None)
    assert (len(evaluator.pool), len(evaluator.pool.replicas), evaluator.report()["threads"]) == (2, 2, 2)
    assert (evaluator.report()["batch_size"], evaluator.chunk) == (2, Chunk(8, 16))
    assert {replica.batch for replica in evaluator.pool.replicas} == {(2, LENGTH)}
    assert make_evaluator(llama, measure=True, threads=1).report()["threads"] == 1


def test_the_compute_dtype_is_one_that_this_machine_multiplies_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy it is: the processor's instructions decide, as the kernel lists them."""
    assert fastest_dtype() in (torch.float32, torch.bfloat16)
    if (listed := Path("/proc/cpuinfo")).is_file():
        native = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"} & set(listed.read_text().split())
        assert fastest_dtype() == (torch.bfloat16 if native else torch.float32)
    for names, dtype in (((), torch.float32), (("amx_bf16",), torch.bfloat16), (("bf16",), torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda names=names: dict.fromkeys(names, True))
        assert fastest_dtype("cpu") == dtype
    assert fastest_dtype("mps") == torch.float32
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, found=supported: found)
        assert fastest_dtype("cuda:1") == (torch.bfloat16 if supported else torch.float32)


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
    """Says that what is compiled takes ``factor`` times as long; every other run is an eager one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
        self.factor, self.runs = factor, dict[Any, int]()
        monkeypatch.setattr(torch, "compile", lambda code, **_: code)
        monkeypatch.setattr(compiling, "_seconds", self.seconds)

    def seconds(self, _: Replica, work: Any, __: Tensor) -> float:
        self.runs[work] = self.runs.get(work, 0) + 1
        return 1.0 if self.runs[work] % 2 else self.factor


@pytest.mark.parametrize(("factor", "kept"), [(0.5, ("blocks", "chunk")), (0.99, ())])
def test_what_is_compiled_is_kept_where_it_is_faster_and_the_decision_stays(
    llama: Parts,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    factor: float,
    kept: tuple[str, ...],
) -> None:
    for ratio in (factor, 1 / factor):  # the second time, the clock says the opposite
        _Clock(monkeypatch, ratio)
        evaluator = make_evaluator(llama, compile=True, cache=tmp_path / "scores.db")
        assert evaluator.report()["compiled"] == kept


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Callable[[Any, Any], Any]) -> None:
    """In place of inductor; kept whether it is faster or not."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda code, **given: compiler(code, **(given | {"backend": backend})))
    monkeypatch.setattr(compiling, "GAIN", 0.0)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_shape_of_a_pass_is_compiled_whatever_ran_before(
    llama: Parts, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Torch itself gives up after some: from then on, what a pass computes would depend on the passes before it."""
    graphs, limits = list[str](), set[int]()

    def backend(module: Any, _: Any) -> Any:
        def run(*inputs: Any) -> Any:
            graphs.append(str(module))
            limits.add(torch._dynamo.config.recompile_limit)
            return module.forward(*inputs)

        return run

    compile_with(monkeypatch, backend)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        evaluator = make_evaluator(llama, batch_size=5, compile=True, threads=threads)
        evaluator.prepare()
        candidate = random_assignments(1, len(llama[1].units), 3)
        for sequences in range(1, 5):
            graphs.clear()
            losses_of(evaluator, candidate, Minibatch(sequences, sequences * LENGTH))
            assert len(graphs) == len(evaluator.blocks) + 1  # and the chunk of logits
    assert min(limits) == compiling.SHAPES  # a thread's own, too
    torch._dynamo.reset()


def test_no_other_thread_runs_the_model_while_one_compiles(llama: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """That something compiles is a flag of the process, and with it set, a model's own code makes other masks."""
    compiled_by, told = set[int](), list[bool]()
    embed = torch.nn.Embedding.forward

    def backend(module: Any, _: Any) -> Any:
        compiled_by.add(threading.get_ident())
        time.sleep(0.05)
        return module.forward

    def embedding(module: torch.nn.Embedding, ids: Tensor) -> Tensor:
        told.append(torch.compiler.is_compiling())
        return embed(module, ids)

    compile_with(monkeypatch, backend)
    torch._dynamo.reset()
    evaluator = make_evaluator(llama, batch_size=5, compile=True, threads=2)
    monkeypatch.setattr(torch.nn.Embedding, "forward", embedding)
    losses_of(evaluator, random_assignments(3, len(llama[1].units), 3))
    assert compiled_by - {threading.get_ident()}  # some of it in the threads
    assert not any(told)
    torch._dynamo.reset()


def test_what_is_compiled_for_new_inputs_is_so_alone_and_experts_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts see another number of tokens each time, and would be compiled for each of them."""
    alone = list[bool]()

    def backend(module: Any, _: Any) -> Any:
        alone.append(COMPILE_LOCK._alone)
        return module.forward

    compile_with(monkeypatch, backend)
    for model in (tiny_model("gpt2"), tiny_model("gemma2"), tiny_mixtral()):
        torch._dynamo.reset()
        alone.clear()
        experts = unfuse_experts(model)
        levels = RoundedLevels(model)
        evaluator = make_evaluator((model, levels), batch_size=3, compile=True, threads=2)
        losses_of(evaluator, random_assignments(3, len(levels.units), 3))
        assert evaluator.compiled.parts == (("chunk",) if experts else ("blocks", "chunk"))
        assert alone
        assert all(alone)
    torch._dynamo.reset()


def test_compiled_in_bfloat16_attention_is_replaced_and_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for inductor, not translated to C++: a pass of 1024 tokens, near enough to the eager one."""
    codes: list[str] = []

    def traced(graph: Any, inputs: Any) -> Any:
        codes.append(graph.code)
        return lookup(graph, inputs)

    lookup = torch._dynamo.lookup_backend("aot_eager")
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda _: traced)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(compiling, "GAIN", 0.0)
    torch._dynamo.reset()
    model = tiny_model("llama").bfloat16()
    levels, tokens = RoundedLevels(model), tiny_tokens(length=256)
    eager, compiled = (Evaluator(model, levels, tokens, threads=1, compile=compile) for compile in (False, True))
    candidates = random_assignments(3, len(levels.units), 3)
    losses = [losses_of(each, candidates, Minibatch(0, 1024)) for each in (eager, compiled)]
    assert compiled.compiled.parts == ("blocks", "chunk")
    assert [e.report()[name] for e in (eager, compiled) for name in ("batch_size", "chunk")] == [
        1,
        (512, 1024),
        4,
        (1024, 1024),
    ]
    assert sum("causal_attention" in code for code in codes) > 0
    assert not any("_nn.scaled_dot_product" in code for code in codes)
    assert not len(eager.pool.replicas[0].switch.packed)
    if prepacking._packs(torch.bfloat16):
        assert len(compiled.pool.replicas[0].switch.packed) > 0
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert compiled.context() != eager.context()
    torch._dynamo.reset()


# ---------------------------------------------------------------------- packed weights


@pytest.fixture(scope="module")
def wide() -> Parts:
    """A Llama with matrices of 64 inputs, which packing leaves alone to the bit, and of 896, which it may not."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=896, num_hidden_layers=2, num_attention_heads=4
    )
    model = random_model(config, spread=0.25)
    return model, RoundedLevels(model)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_no_loss_depends_on_what_was_packed(wide: Parts, batch_size: int) -> None:
    candidates, minibatch = random_assignments(6, len(wide[1].units), 3), Minibatch(5, 4 * 33)

    def made(packed_bytes: int) -> Evaluator:
        return Evaluator(*wide, tiny_tokens(length=33), threads=1, batch_size=batch_size, packed_bytes=packed_bytes)

    expected = losses_of(made(0), candidates, minibatch)
    for packed_bytes in (40_000, 1 << 30):  # a weight of 64 x 64 takes 16 384 bytes
        evaluator = made(packed_bytes)
        for order in (candidates, candidates[::-1], candidates[:1]):
            evaluator.score(order, Minibatch(6, 4 * 33))
            evaluator.evaluate_held_out(order[0], tiny_tokens(2, 9))
        assert losses_of(evaluator, candidates, minibatch) == expected
        assert losses_of(made(packed_bytes), candidates[:1], minibatch) == expected[:1]
    packs = evaluator.pool.replicas[0].switch.packed
    assert packs.rows == batch_size * 33
    assert not torch.backends.mkl.is_available() or len(packs) >= 8  # type: ignore[no-untyped-call]
