"""What the evaluator promises besides exact losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evo_hpo.errors import InvalidSettingError, ModelError, StoreError
from evo_hpo.language_model import compiling
from evo_hpo.language_model.evaluator import Evaluator
from evo_hpo.language_model.gates import GatedModel
from evo_hpo.language_model.problem import LanguageModelProblem
from evo_hpo.language_model.sampling import sequences_of
from evo_hpo.language_model.tuning import fastest_dtype
from evo_hpo.language_model.worker import Worker
from evo_hpo.problem import Minibatch
from evo_hpo.space import Assignment, CompressionSpace, Unit
from tests.language_model.tiny import (
    DropLevels,
    RoundedLevels,
    plain_losses,
    random_assignments,
    tiny_model,
    tiny_tokens,
)

LENGTH = 12
SMALL, LARGE = Minibatch(5, 3 * LENGTH), Minibatch(5, 7 * LENGTH)


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, RoundedLevels]:
    model = tiny_model("llama")
    return model, RoundedLevels(model)


def _evaluator(parts: tuple[nn.Module, RoundedLevels], **settings: Any) -> Evaluator:
    return Evaluator(*parts, tiny_tokens(length=LENGTH), **{"threads": 1, **settings})


def _losses(evaluator: Evaluator, candidates: list[Assignment], minibatch: Minibatch = LARGE) -> list[float]:
    return [s.loss for s in evaluator.score(candidates, minibatch)]


# ---------------------------------------------------------------------- equal bits


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_loss_does_not_depend_on_company_order_threads_or_memory(
    llama: tuple[nn.Module, RoundedLevels], batch_size: int
) -> None:
    candidates = random_assignments(8, len(llama[1].units), 3)
    together = _losses(_evaluator(llama, batch_size=batch_size), candidates)
    alone = [_losses(_evaluator(llama, batch_size=batch_size), [c])[0] for c in candidates]
    backwards = _losses(_evaluator(llama, batch_size=batch_size, threads=2), candidates[::-1])[::-1]
    stateless = _losses(_evaluator(llama, batch_size=batch_size, state_bytes=0), candidates)
    assert together == alone == backwards == stateless


def test_a_minibatch_used_again_starts_from_the_best_assignment_with_equal_bits(
    llama: tuple[nn.Module, RoundedLevels],
) -> None:
    candidates = random_assignments(8, len(llama[1].units), 3)
    plain, with_reference = _evaluator(llama, reference_bytes=0), _evaluator(llama)
    for candidate in candidates:
        assert _losses(plain, [candidate]) == _losses(with_reference, [candidate])
    assert plain.report()["blocks_shared"] == 0
    assert with_reference.report()["blocks_shared"] > 0


def test_nested_minibatches_read_only_what_is_new(llama: tuple[nn.Module, RoundedLevels]) -> None:
    candidates = random_assignments(4, len(llama[1].units), 3)
    nested, fresh = _evaluator(llama), _evaluator(llama)
    _losses(nested, candidates, SMALL)
    assert _losses(nested, candidates) == _losses(fresh, candidates)
    assert nested.counts["tokens"] == fresh.counts["tokens"] == 4 * LARGE.tokens
    assert _losses(nested, candidates, SMALL) == _losses(_evaluator(llama), candidates, SMALL)
    assert nested.counts["tokens"] == 4 * LARGE.tokens


def test_the_model_is_left_as_it_was(llama: tuple[nn.Module, RoundedLevels]) -> None:
    model, levels = llama
    before = {n: (id(p), p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    _losses(_evaluator(llama), random_assignments(3, len(levels.units), 3))
    for name, parameter in model.named_parameters():
        assert (id(parameter), parameter.data_ptr()) == before[name][:2]
        assert torch.equal(parameter, before[name][2])
    assert not any("forward" in module.__dict__ for module in model.modules())


# ---------------------------------------------------------------------- early stopping


@pytest.mark.parametrize("fitness", ["kl", "perplexity", "topk_kl"])
def test_early_stopping_finds_the_same_best(llama: tuple[nn.Module, RoundedLevels], fitness: str) -> None:
    units = len(llama[1].units)
    candidates = [tuple([k] * i + [2] * (units - i)) for k in (0, 1) for i in (1, 5, 9, 14)]
    truth = _losses(_evaluator(llama, fitness=fitness, early_stopping=False), candidates)
    evaluator = _evaluator(llama, fitness=fitness)
    scores = evaluator.score(candidates, LARGE, keep=2)
    best = sorted(range(len(truth)), key=truth.__getitem__)[:2]
    assert sorted(range(len(truth)), key=lambda i: (scores[i].stopped, scores[i].loss))[:2] == best
    for score, loss in zip(scores, truth, strict=True):
        assert score.loss == loss if not score.stopped else sorted(truth)[1] < score.loss <= loss
        assert score.tokens == LARGE.tokens or score.stopped
    assert evaluator.counts["tokens"] == sum(s.tokens for s in scores)
    if fitness == "kl":
        assert evaluator.counts["stopped"] > 0


# ---------------------------------------------------------------------- fitness


def test_top_k_divergence_pools_the_tail(llama: tuple[nn.Module, RoundedLevels]) -> None:
    model, levels = llama
    candidate = random_assignments(1, len(levels.units), 3)[0]
    loss = _losses(_evaluator(llama, fitness="topk_kl", top_k=5), [candidate])[0]
    tokens = tiny_tokens(length=LENGTH)
    chosen = tokens[list(sequences_of(LARGE, len(tokens), LENGTH))]
    with torch.no_grad():
        p = model(input_ids=chosen).logits[:, :-1].double().softmax(-1)
        compressed = tiny_model("llama")
        modules = dict(compressed.named_modules())
        for unit, level in enumerate(candidate):
            for name, weight in levels.weights(unit, level).items():
                modules[name].weight.copy_(weight)
        q = compressed(input_ids=chosen).logits[:, :-1].double().softmax(-1)
    top = p.topk(5).indices
    p, q = (torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)], -1) for x in (p, q))
    assert loss == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)


def test_losses_of_each_sequence_average_to_the_loss(llama: tuple[nn.Module, RoundedLevels]) -> None:
    evaluator = _evaluator(llama)
    candidate = random_assignments(1, len(llama[1].units), 3)[0]
    sequences = evaluator.per_sequence(candidate, LARGE)
    assert len(sequences) == 7
    assert float(sequences.mean()) == pytest.approx(_losses(evaluator, [candidate])[0], rel=1e-12)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_held_out_figures_equal_the_plain_computation(name: str) -> None:
    model, held_out = tiny_model(name), tiny_tokens(5, 9, seed=3)
    levels = RoundedLevels(model)
    evaluator = Evaluator(model, levels, tiny_tokens(), threads=2)
    candidate = random_assignments(1, len(levels.units), 3)[0]
    figures = evaluator.evaluate_held_out(candidate, held_out)
    divergence, entropy = plain_losses(lambda: tiny_model(name), levels, candidate, held_out)
    assert figures["loss"] == pytest.approx(float(divergence.mean()), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(float(entropy.mean())), rel=1e-5)
    np.testing.assert_allclose(figures["losses"], divergence.mean(1), rtol=2e-5)  # of 8 tokens in 16 bits each
    np.testing.assert_allclose(figures["cross_entropies"], entropy.mean(1), rtol=1e-5)
    assert abs(evaluator.evaluate_held_out(None, held_out)["loss"]) < 1e-6


# ---------------------------------------------------------------------- dropping


@pytest.mark.parametrize(("name", "outputs"), [("llama", ("o_proj", "down_proj")), ("gpt2", ("c_proj", "c_proj"))])
def test_a_dropped_module_contributes_nothing(name: str, outputs: tuple[str, str]) -> None:
    model = tiny_model(name)
    levels = DropLevels(model)
    evaluator = Evaluator(model, levels, tiny_tokens(length=LENGTH), threads=1)
    rng = np.random.default_rng(0)
    candidates = [tuple(int(x) for x in rng.integers(2, size=len(levels.units))) for _ in range(5)]
    plain = tiny_model(name)
    for candidate, loss in zip(candidates, _losses(evaluator, list(dict.fromkeys(candidates))), strict=True):
        plain.load_state_dict(model.state_dict())
        modules = dict(plain.named_modules())
        for number, (unit, level) in enumerate(zip(levels.units, candidate, strict=True)):
            if level == 0:
                last = modules[f"{unit.name}.{outputs[number >= len(levels.units) // 2]}"]
                for parameter in last.parameters():
                    nn.init.zeros_(parameter)
        assert loss == pytest.approx(_divergence(model, plain), rel=1e-5, abs=1e-6)


def test_a_dropped_block_passes_its_input_on() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    levels = DropLevels(model, ["block"])
    evaluator = Evaluator(model, levels, tiny_tokens(length=LENGTH), threads=1)
    layers: Any = plain.model
    layers.layers = nn.ModuleList([layers.layers[0], layers.layers[2]])
    layers.config.num_hidden_layers = 2
    losses = _losses(evaluator, [(1, 0, 1), (1, 1, 1)])
    assert losses[0] == pytest.approx(_divergence(model, plain), rel=1e-5)
    assert abs(losses[1]) < 1e-6


def _divergence(dense: nn.Module, compressed: nn.Module) -> float:
    tokens = tiny_tokens(length=LENGTH)
    chosen = tokens[list(sequences_of(LARGE, len(tokens), LENGTH))]
    with torch.no_grad():
        log_p, log_q = (
            m(input_ids=chosen, use_cache=False).logits[:, :-1].double().log_softmax(-1) for m in (dense, compressed)
        )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


# ---------------------------------------------------------------------- cache


def test_nothing_is_paid_for_twice(llama: tuple[nn.Module, RoundedLevels], tmp_path: Path) -> None:
    candidates = random_assignments(3, len(llama[1].units), 3)
    first, second = (_evaluator(llama, cache=tmp_path / "scores.db") for _ in range(2))
    losses = _losses(first, candidates)
    assert _losses(second, candidates) == losses
    assert second.counts["cached"] == 3
    assert second.counts["tokens"] == 0
    exported = {(a, m): s for a, m, s in second.cache.export()}
    assert set(exported) == {(c, LARGE) for c in candidates}
    assert exported[candidates[0], LARGE].mean() / (LENGTH - 1) == pytest.approx(losses[0], rel=1e-12)
    other = _evaluator(llama, cache=tmp_path / "scores.db", fitness="perplexity")
    assert _losses(other, candidates) != losses


def test_measured_settings_are_kept_so_that_bits_stay(llama: tuple[nn.Module, RoundedLevels], tmp_path: Path) -> None:
    first, second = (_evaluator(llama, cache=tmp_path / "scores.db", measure=True, threads=None) for _ in range(2))
    names = ("batch_size", "chunk", "threads")
    assert [first.report()[n] for n in names] == [second.report()[n] for n in names]
    assert any(what.startswith("chunk") and rate > 0 for what, rate in first.report()["measured"])
    assert not second.report()["measured"]
    candidates = random_assignments(3, len(llama[1].units), 3)
    np.testing.assert_allclose(_losses(second, candidates), _losses(_evaluator(llama), candidates), rtol=1e-6)


def test_the_compute_dtype_is_one_that_this_machine_multiplies_fast() -> None:
    assert fastest_dtype() in (torch.float32, torch.bfloat16)


@pytest.mark.filterwarnings("ignore")
def test_without_a_compiler_the_blocks_stay_eager(
    llama: tuple[nn.Module, RoundedLevels], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no working C++ compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", no_compiler)
    evaluator = _evaluator(llama, compile=True)
    assert evaluator.report()["compiled"] == ()
    assert caplog.messages == [
        f"{part} are not compiled: RuntimeError: no working C++ compiler"
        for part in ("decoder blocks", "chunks of logits")
    ]
    candidates = random_assignments(2, len(llama[1].units), 3)
    assert _losses(evaluator, candidates) == _losses(_evaluator(llama), candidates)


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
    llama: tuple[nn.Module, RoundedLevels],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    factor: float,
    kept: tuple[str, ...],
) -> None:
    for time in (factor, 1 / factor):  # the second time, the clock says the opposite
        _Clock(monkeypatch, time)
        evaluator = _evaluator(llama, compile=True, cache=tmp_path / "scores.db")
        assert evaluator.report()["compiled"] == kept


# ---------------------------------------------------------------------- failures


class _BrokenLevels(RoundedLevels):
    """Level 0 of the first block's last linear layer is not a number."""

    def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
        weights = super().weights(unit, level)
        return {n: w * math.nan for n, w in weights.items() if w is not None} if (unit, level) == (6, 0) else weights


def test_a_loss_that_is_not_finite_is_the_worst_and_counted(llama: tuple[nn.Module, RoundedLevels]) -> None:
    model, levels = llama
    units = len(levels.units)
    for keep in (None, 1):
        evaluator = Evaluator(model, _BrokenLevels(model), tiny_tokens(length=LENGTH), threads=1)
        bad, good = evaluator.score([(0,) * units, (2,) * units], SMALL, keep=keep)
        assert bad.loss == math.inf
        assert bad.reason == "the loss is not finite"
        assert math.isfinite(good.loss)
        assert evaluator.report()["non_finite"] == 1


def test_running_out_of_memory_halves_the_batch(
    llama: tuple[nn.Module, RoundedLevels], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    candidates = random_assignments(3, len(llama[1].units), 3)
    evaluator, run = _evaluator(llama, batch_size=4), Worker.run

    def greedy(self: Worker, *arguments: Any) -> Any:
        if len(arguments[2]) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return run(self, *arguments)

    monkeypatch.setattr(Worker, "run", greedy)
    assert _losses(evaluator, candidates) == _losses(_evaluator(llama, batch_size=1), candidates)
    assert evaluator.report()["batch_size"] == 1
    assert evaluator.report()["out_of_memory"] == 2
    assert caplog.messages == [f"out of memory: going on with {size} sequences a batch" for size in (2, 1)]


def test_memory_that_never_suffices_is_an_error(
    llama: tuple[nn.Module, RoundedLevels], monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Worker, "run", greedy)
    with pytest.raises(MemoryError):
        _losses(_evaluator(llama), random_assignments(1, len(llama[1].units), 3))


class _Crossed(nn.Module):
    """Its third block also sees the first one's output."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(50, 8, _weight=torch.randn(50, 8, generator=generator))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 50)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        first = self.blocks[0](self.embedding(input_ids))
        logits: Tensor = self.head(self.blocks[2](self.blocks[1](first) + first))
        return logits


def test_a_model_whose_blocks_exchange_more_than_one_state_is_refused() -> None:
    with pytest.raises(ModelError, match="exchange more than one hidden state"):
        GatedModel(_Crossed(), torch.arange(8)[None])


@pytest.mark.parametrize("tokens", [0, LENGTH - 1, LENGTH + 1, 9 * LENGTH])
def test_a_minibatch_that_cannot_be_drawn_is_an_error(llama: tuple[nn.Module, RoundedLevels], tokens: int) -> None:
    with pytest.raises(InvalidSettingError):
        _evaluator(llama).score([], Minibatch(0, tokens))


@pytest.mark.parametrize(
    "settings", [{"fitness": "mse"}, {"batch_size": 0}, {"threads": 0}, {"calibration_tokens": torch.zeros(3)}]
)
def test_settings_outside_their_range_are_errors(
    llama: tuple[nn.Module, RoundedLevels], settings: dict[str, Any]
) -> None:
    with pytest.raises(InvalidSettingError):
        Evaluator(*llama, **{"calibration_tokens": tiny_tokens(), **settings})


class _ForeignLevels(RoundedLevels):
    def __init__(self, model: nn.Module, unit: Unit) -> None:
        super().__init__(model)
        self.units = [unit, *self.units[1:]]

    def weights(self, unit: int, level: int) -> Mapping[str, Tensor | None]:
        return {name: torch.zeros(3, 3) for name in self.units[unit].members}


@pytest.mark.parametrize("name", ["no.such.module", "lm_head", "model.layers.0.mlp.up_proj"])
def test_levels_of_another_model_are_refused(name: str) -> None:
    model = tiny_model("llama")
    levels = _ForeignLevels(model, Unit(name, (1, 2, 3)))
    with pytest.raises(StoreError):
        Evaluator(model, levels, tiny_tokens(), threads=1).score([(0,) * len(levels.units)], SMALL)


# ---------------------------------------------------------------------- minibatches and the problem


def test_minibatches_of_one_seed_are_nested_and_seeds_differ() -> None:
    small, large = (sequences_of(Minibatch(7, n * 4), 50, 4) for n in (5, 20))
    assert large[:5] == small
    assert len(set(large)) == 20
    assert sequences_of(Minibatch(8, 20), 50, 4) != small


def test_the_problem_validates_once_and_identifies_itself(
    llama: tuple[nn.Module, RoundedLevels], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = _evaluator(llama)
    space = CompressionSpace.from_average(llama[1].units, 4)
    problem = LanguageModelProblem(evaluator, space, tiny_tokens(4, 9, seed=1), tokens=LENGTH, name="tiny")
    uniform = space.uniform()
    figures = problem.validate(uniform)
    monkeypatch.setattr(evaluator, "evaluate_held_out", None)
    assert problem.validate(uniform) == figures
    assert figures.keys() == {"loss", "cross_entropy", "perplexity"}
    assert problem.pool_tokens == 8 * LENGTH
    assert problem.score([uniform], SMALL)[0].tokens == SMALL.tokens
    other = LanguageModelProblem(evaluator, space, tiny_tokens(4, 9, seed=2), tokens=LENGTH, name="tiny")
    assert problem.fingerprint() != other.fingerprint()
    with pytest.raises(InvalidSettingError):
        problem.check(LENGTH + 1)
