"""What the evaluator promises besides exact losses: equal bits, exact early stopping, nested minibatches."""

from __future__ import annotations

import pytest
import torch

from evo_hpo.errors import InvalidSettingError
from evo_hpo.models.mixed import mix
from evo_hpo.scoring.kept_inputs import KeptPath, KeptPaths
from evo_hpo.scoring.language_model_problem import LanguageModelProblem
from evo_hpo.scoring.prefixes import Signature, Visit, plan_visits
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.search.problem import Minibatch
from evo_hpo.space.compression_space import CompressionSpace
from tests.scoring.evaluators import LARGE, LENGTH, SMALL, Parts, losses_of, make_evaluator
from tests.tiny import RoundedLevels, random_assignments, tiny_model, tiny_tokens


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_loss_does_not_depend_on_company_order_threads_or_memory(llama: Parts, batch_size: int) -> None:
    candidates = random_assignments(8, len(llama[1].units), 3)
    together = losses_of(make_evaluator(llama, batch_size=batch_size), candidates)
    alone = [losses_of(make_evaluator(llama, batch_size=batch_size), [c])[0] for c in candidates]
    backwards = losses_of(make_evaluator(llama, batch_size=batch_size, threads=2), candidates[::-1])[::-1]
    stateless = losses_of(make_evaluator(llama, batch_size=batch_size, state_bytes=0), candidates)
    assert together == alone == backwards == stateless


def test_a_minibatch_used_again_starts_from_the_best_assignment_with_equal_bits(
    llama: Parts,
) -> None:
    candidates = random_assignments(8, len(llama[1].units), 3)
    plain, with_reference = make_evaluator(llama, reference_bytes=0), make_evaluator(llama)
    for candidate in candidates:
        assert losses_of(plain, [candidate]) == losses_of(with_reference, [candidate])
    assert plain.report()["blocks_shared"] == 0
    assert with_reference.report()["blocks_shared"] > 0


@pytest.mark.parametrize("mixed", [False, True])
def test_kept_block_inputs_take_no_more_than_was_reckoned(monkeypatch: pytest.MonkeyPatch, mixed: bool) -> None:
    """Those of a path, between calls; and those that wait within a pass."""
    model = tiny_model("llama")
    if mixed:
        mix(model)
    levels, begin, path_bytes, limits = RoundedLevels(model), KeptPaths.begin, [], []

    def noted(self: KeptPaths, minibatch: tuple[int | None, int], bytes_: int, candidates: int) -> bool:
        path_bytes.append(bytes_)
        return begin(self, minibatch, bytes_, candidates)

    def limited(signatures: list[Signature], most: int) -> list[Visit]:
        limits.append(most)
        return plan_visits(signatures, most)

    monkeypatch.setattr(KeptPaths, "begin", noted)
    monkeypatch.setattr("evo_hpo.scoring.replica.plan_visits", limited)
    state = LENGTH * 32 * 4  # the stream that blocks add to is float32 in either
    evaluator = make_evaluator((model, levels), state_bytes=2 * state - 1)
    for level in (1, 0, 2):
        losses_of(evaluator, [(level,) * len(levels.units)], SMALL)
    kept = evaluator._batches.reference.get(sequences_of(SMALL, 8, LENGTH)[:1])
    assert kept is not None
    assert {each.nbytes for each in kept.path.values()} == {state}
    assert path_bytes == [len(evaluator.blocks) * 3 * state] * 3
    assert set(limits) == {1}


def test_block_inputs_of_another_minibatch_are_forgotten() -> None:
    kept, path = KeptPaths(1000), KeptPath((), {})
    assert not kept.begin((0, 2), 100, 1)
    assert kept.begin((0, 2), 100, 1)
    kept.offer(1.0, {(3,): path})
    assert kept.get((3,)) is path
    assert not kept.begin((0, 4), 100, 1)  # its first sequences are the same, its passes need not be
    assert kept.get((3,)) is None
    kept.offer(2.0, {(3,): path})
    assert kept.get((3,)) is path


def test_nested_minibatches_read_only_what_is_new(llama: Parts) -> None:
    candidates = random_assignments(4, len(llama[1].units), 3)
    nested, fresh = make_evaluator(llama), make_evaluator(llama)
    losses_of(nested, candidates, SMALL)
    assert losses_of(nested, candidates) == losses_of(fresh, candidates)
    assert nested.counts["tokens"] == fresh.counts["tokens"] == 4 * LARGE.tokens
    assert losses_of(nested, candidates, SMALL) == losses_of(make_evaluator(llama), candidates, SMALL)
    assert nested.counts["tokens"] == 4 * LARGE.tokens


def test_the_model_is_left_as_it_was(llama: Parts) -> None:
    model, levels = llama
    before = {n: (id(p), p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    losses_of(make_evaluator(llama), random_assignments(3, len(levels.units), 3))
    for name, parameter in model.named_parameters():
        assert (id(parameter), parameter.data_ptr()) == before[name][:2]
        assert torch.equal(parameter, before[name][2])
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("fitness", ["kl", "perplexity", "topk_kl"])
def test_early_stopping_finds_the_same_best(llama: Parts, fitness: str) -> None:
    units = len(llama[1].units)
    candidates = [tuple([k] * i + [2] * (units - i)) for k in (0, 1) for i in (1, 5, 9, 14)]
    truth = losses_of(make_evaluator(llama, fitness=fitness, early_stopping=False), candidates)
    evaluator = make_evaluator(llama, fitness=fitness)
    scores = evaluator.score(candidates, LARGE, keep=2)
    best = sorted(range(len(truth)), key=truth.__getitem__)[:2]
    assert sorted(range(len(truth)), key=lambda i: (scores[i].stopped, scores[i].loss))[:2] == best
    for score, loss in zip(scores, truth, strict=True):
        assert score.loss == loss if not score.stopped else sorted(truth)[1] < score.loss <= loss
        assert score.tokens == LARGE.tokens or score.stopped
        assert (score.by_sequence is None) == score.stopped
    assert evaluator.counts["tokens"] == sum(s.tokens for s in scores)
    if fitness == "kl":
        assert evaluator.counts["stopped"] > 0


def test_minibatches_of_one_seed_are_nested_and_seeds_differ() -> None:
    small, large = (sequences_of(Minibatch(7, n * 4), 50, 4) for n in (5, 20))
    assert large[:5] == small
    assert len(set(large)) == 20
    assert sequences_of(Minibatch(8, 20), 50, 4) != small


def test_the_problem_validates_once_and_identifies_itself(llama: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = make_evaluator(llama)
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
