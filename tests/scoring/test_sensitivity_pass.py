"""How a backward pass runs: graphs, groups and batches of sequences, levels decoded once, what a failure leaves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from evo_hpo.levels.levels import Levels
from evo_hpo.models.experts import unfuse_experts
from evo_hpo.scoring import devices, projections, sensitivities, weight_changes
from evo_hpo.scoring.backward import BackwardReplica
from evo_hpo.scoring.head import Chunk
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.scoring.sensitivities import SensitivityPass
from evo_hpo.scoring.tuning import PassShape
from evo_hpo.search.problem import Minibatch
from evo_hpo.search.sensitivities import Form, Kind
from tests.scoring.evaluators import make_evaluator
from tests.tiny import (
    VOCABULARY,
    DropLevels,
    RoundedLevels,
    random_assignments,
    random_model,
    tiny_mixtral,
    tiny_model,
    tiny_tokens,
)

MINIBATCH = Minibatch(seed=5, tokens=60)


class Started(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not operator.is_view
        return operator(*args, **(kwargs or {}))


def made(name: str) -> tuple[nn.Module, Levels]:
    """An architecture with rounded weights, or a Llama whose modules and blocks may be dropped."""
    model = tiny_mixtral() if name == "mixtral" else tiny_model("llama" if name == "dropped" else name)
    if name == "mixtral":
        unfuse_experts(model)
    return model, DropLevels(model, ["attention", "mlp", "block"]) if name == "dropped" else RoundedLevels(model)


@pytest.mark.parametrize(
    "settings",
    [{"graph_bytes": 0}, {"graph_bytes": 1 << 17}, {"group": 2}, {"group": 1}, {"batch": 2}, {"batch": 16}],
)
def test_neither_graphs_that_are_made_again_nor_groups_change_a_projection(settings: dict[str, int]) -> None:
    model = tiny_model("llama")
    levels, tokens = RoundedLevels(model), tiny_tokens()
    whole = SensitivityPass(model, levels, tokens).measure(None, MINIBATCH)
    measured = SensitivityPass(model, levels, tokens, **settings)  # type: ignore[arg-type]
    other = measured.measure(None, MINIBATCH)
    if settings.get("graph_bytes"):
        assert 0 < measured._replicas[0].kept_from < 3  # one graph is kept, another is not
    np.testing.assert_allclose(other.projections, whole.projections, rtol=1e-3, atol=1e-5)
    assert whole.squares is not None
    assert other.squares is not None
    np.testing.assert_allclose(other.squares, whole.squares, rtol=1e-3, atol=1e-5)


def test_levels_are_decoded_once_for_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    levels, decoded = RoundedLevels(model), Counter[tuple[int, int]]()
    weights = levels.weights

    def counted(unit: int, level: int) -> Any:
        decoded[unit, level] += 1
        return weights(unit, level)

    sensitivities = SensitivityPass(model, levels, tiny_tokens(), batch=1)
    monkeypatch.setattr(levels, "weights", counted)
    sensitivities.measure(None, MINIBATCH)
    assert decoded == dict.fromkeys(((u, k) for u in range(len(levels.units)) for k in range(3)), 1)


def test_as_on_a_gpu_a_pass_starts_few_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a small model takes longer to start there than to do: at most 2.5 times those of a forward pass."""
    monkeypatch.setattr(devices, "has_small_caches", lambda _: False)
    monkeypatch.setattr(devices, "has_matrix_units", lambda _: True)

    def started(blocks: int) -> tuple[int, int]:
        size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        model = random_model(
            LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=blocks, num_key_value_heads=2, **size)
        ).bfloat16()
        measured = SensitivityPass(model, RoundedLevels(model), tiny_tokens(), batch=8)
        with Started() as whole:
            measured.measure(None, MINIBATCH)
        with torch.no_grad(), Started() as forward:
            measured._replicas[0].gated.final_hidden(tiny_tokens())
        return whole.count, forward.count

    (fewer, forward_fewer), (more, forward_more) = started(2), started(4)
    assert more - fewer < 2.5 * (forward_more - forward_fewer)


def test_logits_are_taken_in_chunks_that_suit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chunk = tiny_model("llama"), Chunk(7, 11)
    monkeypatch.setattr(sensitivities, "default_shape", lambda device, length, compiled: PassShape(1, chunk))
    assert SensitivityPass(model, RoundedLevels(model), tiny_tokens())._replicas[0].head.chunk == chunk
    own = Chunk(3, 5)
    assert SensitivityPass(model, RoundedLevels(model), tiny_tokens(), chunk=own)._replicas[0].head.chunk == own


@pytest.mark.parametrize(
    ("kind", "form"), [("sampled", "inner"), ("kl", "inner"), ("true", "trace"), ("true", "output")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cores_share_the_sequences_and_no_bit_depends_on_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, form: Form, dtype: torch.dtype
) -> None:
    """Head and embedding searched too; each level is decoded once for all of the cores, where they are in place too."""
    model = tiny_model("llama").to(dtype)
    levels, decoded = RoundedLevels(model, outer=True), Counter[tuple[int, int]]()
    weights = levels.weights

    def counted(unit: int, level: int) -> Any:
        decoded[unit, level] += 1
        return weights(unit, level)

    at = None if kind != "kl" else random_assignments(1, len(levels.units), 3)[0]
    alone = SensitivityPass(model, levels, tiny_tokens()).measure(at, MINIBATCH, kind, form)
    at_work: set[int] = set()
    through = BackwardReplica.through

    def noted(replica: BackwardReplica, number: int) -> None:
        at_work.add(id(replica))
        through(replica, number)

    monkeypatch.setattr(BackwardReplica, "through", noted)
    for threads, cores in ((1, 1), (2, 2), (4, 3), (16, 5)):  # five sequences
        pool = make_evaluator((model, levels), threads=threads).pool
        passed = SensitivityPass(model, levels, tiny_tokens(), pool=pool)
        passed.measure(at, MINIBATCH, kind, form)
        decoded.clear()
        at_work.clear()
        with monkeypatch.context() as patch:
            patch.setattr(levels, "weights", counted)
            found = passed.measure(at, MINIBATCH, kind, form)
        assert len(at_work) == cores
        assert set(decoded.values()) <= {1, 2}  # in place; the tied matrix: as head, and as embedding
        np.testing.assert_array_equal(found.projections, alone.projections)
        if found.squares is not None:
            np.testing.assert_array_equal(found.squares, alone.squares)


def test_experts_see_other_tokens_of_each_sequence_and_no_bit_depends_on_the_cores() -> None:
    model = tiny_mixtral().bfloat16()
    unfuse_experts(model)
    levels, tokens = RoundedLevels(model), tiny_tokens(length=120)
    alone = SensitivityPass(model, levels, tokens).measure(None, Minibatch(0, 5 * 120))
    pool = make_evaluator((model, levels), threads=3).pool
    found = SensitivityPass(model, levels, tokens, pool=pool).measure(None, Minibatch(0, 5 * 120))
    np.testing.assert_array_equal(found.projections, alone.projections)


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "outer"])
def test_moved_outputs_tell_what_gradients_do(monkeypatch: pytest.MonkeyPatch, name: str, batch: int) -> None:
    """In single precision, where both are exact; some rows at a time, and all."""
    model, levels = made("llama" if name == "outer" else name)
    levels = RoundedLevels(model, outer=True) if name == "outer" else levels
    at = random_assignments(1, len(levels.units), 2)[0]
    monkeypatch.setattr(projections, "PART", 4)
    asked: list[Kind] = ["kl", "true"]

    def found(moves: bool) -> list[Any]:
        monkeypatch.setattr(weight_changes, "moves_outputs", lambda _: moves)
        measured = SensitivityPass(model, levels, tiny_tokens(), batch=batch)
        return [measured.measure(at if kind == "kl" else None, MINIBATCH, kind) for kind in asked]

    expected = found(False)
    for most in (1 << 23, 200):
        monkeypatch.setattr(weight_changes, "OUTPUTS_ON_A_CPU", most)
        for own, other in zip(found(True), expected, strict=True):
            scale = np.abs(other.projections).max()
            np.testing.assert_allclose(own.projections, other.projections, rtol=1e-3, atol=1e-5 * scale)
            if other.squares is not None:
                np.testing.assert_allclose(own.squares, other.squares, rtol=1e-3, atol=1e-5 * scale**2)


def test_blocks_may_read_the_embedding_by_way_of_another_argument() -> None:
    """As Zamba's do: what reaches it there counts too."""
    model: Any = tiny_model("llama")
    embedding = model.get_input_embeddings()
    read: list[Tensor] = []

    class Reading(type(model.model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            kwargs.pop("inputs_embeds", None)
            embedded = self.embed_tokens(input_ids)
            read[:] = [embedded.clone()]
            return super().forward(inputs_embeds=embedded, **kwargs)

    model.model.__class__ = Reading
    for block in model.model.layers:
        own = block.forward

        def forward(hidden_states: Tensor, *args: Any, own: Any = own, **kwargs: Any) -> Any:
            return own(hidden_states + 0.5 * read[0], *args, **kwargs)

        block.forward = forward
    levels = RoundedLevels(model, outer=True)
    number = next(i for i, u in enumerate(levels.units) if any("embed" in m for m in u.members))
    found = SensitivityPass(model, levels, tiny_tokens()).measure(None, Minibatch(5, 12), "true")
    weight = embedding.weight
    weight.requires_grad_()
    (ids,) = tiny_tokens()[list(sequences_of(Minibatch(5, 12), len(tiny_tokens()), 12))]
    logits = model(ids[None]).logits[0, :-1]
    loss = torch.log_softmax(logits.double(), -1).gather(1, ids[1:, None]).sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    for level in range(3):
        target = levels.weights(number, level)[levels.units[number].members[0]]
        expected = float((gradient.double() * (target - weight).detach().double()).sum())
        assert found.projections[0, number, level] == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("settings", [{}, {"batch": 2}, {"graph_bytes": 1 << 17}, {"group": 3}])
@pytest.mark.parametrize("name", ["gpt2", "opt", "cohere", "mixtral", "dropped"])
def test_cores_share_the_sequences_of_every_model(
    monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, int], moves: bool
) -> None:
    """Biased and transposed layers, a soft cap or scale of logits, experts, modules and blocks that are dropped."""
    monkeypatch.setattr(weight_changes, "moves_outputs", lambda _: moves)
    monkeypatch.setattr(weight_changes, "OUTPUTS_ON_A_CPU", 200)
    model, levels = made(name)
    at = random_assignments(1, len(levels.units), 2)[0]
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        try:
            pool = make_evaluator((model, levels), threads=threads).pool
            passed = SensitivityPass(model, levels, tiny_tokens(), pool=pool, **settings)  # type: ignore[arg-type]
            forms: list[tuple[Kind, Form]] = [("kl", "inner"), ("true", "absolute"), ("sampled", "inner")]
            found.append([passed.measure(at, MINIBATCH, kind, form).projections for kind, form in forms])
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_a_larger_minibatch_begins_with_the_same_projections() -> None:
    model = tiny_model("llama")
    sensitivities = SensitivityPass(model, RoundedLevels(model), tiny_tokens(), group=1)
    small, large = (sensitivities.measure(None, Minibatch(3, 12 * n)) for n in (2, 5))
    np.testing.assert_array_equal(large.projections[:2], small.projections)
    assert sensitivities.measure(None, Minibatch(4, 24)).projections.tolist() != small.projections.tolist()
