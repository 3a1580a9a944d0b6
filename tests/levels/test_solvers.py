"""GPTQ and SparseGPT against a second implementation, closed forms, and their own invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.measurements.compression import oracle
from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.compressor import Inputs
from evo_hpo.levels.factor import factorise, output_error
from evo_hpo.levels.gptq import GPTQSettings, gptq
from evo_hpo.levels.grid import GridSettings
from evo_hpo.levels.masks import Pattern, Sparsity, lowest_n_of_m, parse_sparsities
from evo_hpo.levels.pruners import Magnitude, SparseGPT, Wanda
from evo_hpo.levels.quantizers import GPTQ, RTN
from evo_hpo.levels.rtn import round_to_nearest
from evo_hpo.levels.sparsegpt import sparsegpt


def layer(rows: int = 48, columns: int = 80, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight matrix and the H of correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(4 * columns, columns)) @ (rng.normal(size=(columns, columns)) / 9 + np.eye(columns) / 2)
    inputs *= np.exp(rng.normal(size=columns))
    weight = rng.normal(size=(rows, columns))
    return torch.from_numpy(weight).float(), torch.from_numpy(inputs.T @ inputs).float()


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, 33, 80])
def test_gptq_matches_the_plain_float64_algorithm(
    group_size: int, symmetric: bool, static_groups: bool, activation_order: bool
) -> None:
    weight, hessian = layer()
    settings = GPTQSettings(GridSettings(group_size, symmetric), static_groups, block=20)
    found = gptq(weight, factorise(hessian, activation_order=activation_order), [2, 4], settings)
    for quantized in found:
        expected = oracle.gptq(
            weight.double().numpy(),
            hessian.double().numpy(),
            quantized.bits,
            group_size,
            symmetric=symmetric,
            static_groups=static_groups,
            activation_order=activation_order,
        )
        step = quantized.scale.max()
        same = (quantized.decode() - torch.from_numpy(expected)).abs() < 0.01 * step
        assert same.float().mean() > 0.99  # float32 flips a few roundings, and what follows them
        ours = output_error(weight, quantized.decode(), hessian)
        theirs = oracle.relative_error(weight.double().numpy(), expected, hessian.double().numpy())
        assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("static_groups", [False, True])
def test_block_size_and_row_splits_do_not_change_the_result(static_groups: bool) -> None:
    weight, hessian = layer()
    factor = factorise(hessian)
    reference = gptq(weight, factor, [3], GPTQSettings(GridSettings(24), static_groups, block=80))[0]
    for block, rows in ((1, 8192), (7, 8192), (64, 8192), (32, 5)):
        again = gptq(weight, factor, [3], GPTQSettings(GridSettings(24), static_groups, block, rows))[0]
        assert (again.codes != reference.codes).float().mean() < 0.005  # float32 sums in another order


def test_several_bit_widths_at_once_equal_each_alone() -> None:
    weight, hessian = layer()
    factor = factorise(hessian)
    for quantized in gptq(weight, factor, [1, 2, 3, 5, 8]):
        alone = gptq(weight, factor, [quantized.bits])[0]
        assert (quantized.codes != alone.codes).float().mean() < 0.005


def test_uncorrelated_inputs_make_gptq_round_to_nearest() -> None:
    weight, _ = layer()
    for bits in range(1, 9):
        ours = gptq(weight, factorise(torch.eye(weight.shape[1])), [bits])[0]
        assert torch.equal(ours.codes, round_to_nearest(weight, bits).codes)


def test_error_falls_with_bits_and_gptq_beats_rounding() -> None:
    weight, hessian = layer()
    inputs = Inputs(hessian, weight.shape[1])
    gptq_errors = [level.error for level in GPTQ(range(1, 9), group_size=16).compress(weight, inputs)]
    rtn = RTN(range(1, 9), group_size=16).compress(weight, inputs)
    rtn_errors = [output_error(weight, level.encoded.decode(), hessian) for level in rtn]
    assert gptq_errors == sorted(gptq_errors, reverse=True)
    assert all(ours < theirs for ours, theirs in zip(gptq_errors, rtn_errors, strict=True))


def test_rounding_error_is_at_most_half_a_step() -> None:
    weight, _ = layer()
    for bits in range(2, 9):
        found = round_to_nearest(weight, bits, GridSettings(16))
        step = found.scale.repeat_interleave(16, dim=1)
        assert (
            (found.decode() - weight).abs() <= 1.01 * step
        ).all()  # a rounded zero point costs half a step at the ends
        assert ((found.decode() - weight).abs() <= 0.505 * step).float().mean() > 0.9


def test_inputs_that_never_fire_are_rounded_and_disturb_nothing() -> None:
    weight, hessian = layer()
    hessian[:, 5] = hessian[5] = 0
    found = gptq(weight, factorise(hessian), [4])[0].decode()
    assert torch.isfinite(found).all()
    assert (found[:, 5] - weight[:, 5]).abs().max() < 1


def test_an_input_that_never_fires_counts_as_one_of_mean_size() -> None:
    """A diagonal H is inverted number by number."""
    upper = factorise(torch.diag(torch.tensor([3.0, 0.0, 5.0, 8.0])), damping=0.5).upper
    torch.testing.assert_close(upper, torch.diag((torch.tensor([3.0, 4.0, 5.0, 8.0]) + 2) ** -0.5))


def test_a_layer_of_which_no_input_is_known_is_rounded_to_nearest() -> None:
    """An expert that no token was routed to."""
    weight, _ = layer()
    for ours, theirs in zip(
        GPTQ([2, 4], group_size=16).compress(weight, Inputs(None, 80)),
        RTN([2, 4], group_size=16).compress(weight, Inputs(None, 80)),
        strict=True,
    ):
        assert torch.equal(ours.encoded.decode(), theirs.encoded.decode())
        assert ours.error == pytest.approx(theirs.error, rel=1e-5)
    assert torch.equal(Inputs(None, 80).diagonal, torch.ones(80))


@pytest.mark.parametrize("damping", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("compressor", [GPTQ, SparseGPT])
def test_what_is_no_damping_is_refused_at_once(compressor: type[GPTQ | SparseGPT], damping: float) -> None:
    with pytest.raises(InvalidSettingError, match=f"damping={damping} must be a number above 0"):
        compressor(damping=damping)


def test_a_singular_hessian_is_factorised_with_more_damping() -> None:
    columns = 40
    vector = torch.linspace(1, 2, columns)
    factor = factorise(1e6 * torch.outer(vector, vector), damping=1e-12)
    assert torch.isfinite(factor.upper).all()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_sparsegpt_matches_the_plain_float64_algorithm(sparsity: float) -> None:
    weight, hessian = layer()
    level = parse_sparsities([sparsity])
    pruned, kept = sparsegpt(weight, factorise(hessian), level, block=32)[0]
    expected = oracle.sparsegpt(weight.double().numpy(), hessian.double().numpy(), sparsity, block=32)
    assert (kept.numpy() == (expected != 0)).mean() > 0.99
    ours = output_error(weight, pruned, hessian)
    theirs = oracle.relative_error(weight.double().numpy(), expected, hessian.double().numpy())
    assert ours == pytest.approx(theirs, rel=0.01)


def structured(weight: oracle.Matrix, hessian: oracle.Matrix, keep: int, of: int) -> oracle.Matrix:
    """SparseGPT's n:m as the paper states it: float64, one column after the other, choices a group of columns."""
    inverse, current = oracle.damped_inverse(hessian), weight.copy()
    kept = np.ones(weight.shape, dtype=bool)
    for j in range(weight.shape[1]):
        if j % of == 0:
            pivots, reduced = np.zeros(of), inverse.copy()
            for k in range(of):
                pivots[k] = reduced[j + k, j + k]
                reduced = reduced - np.outer(reduced[:, j + k], reduced[j + k]) / pivots[k]
            saliency = current[:, j : j + of] ** 2 / pivots
            kept[:, j : j + of] = saliency.argsort(1).argsort(1) >= of - keep
        error = np.where(kept[:, j], 0, current[:, j]) / inverse[j, j]
        current = current - np.outer(error, inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return np.where(kept, current, 0)


@pytest.mark.parametrize("block", [8, 128])
@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
def test_sparsegpt_with_patterns_matches_the_plain_float64_algorithm(pattern: str, block: int) -> None:
    weight, hessian = layer()
    pruned, kept = sparsegpt(weight, factorise(hessian), parse_sparsities([pattern]), block=block)[0]
    keep, of = map(int, pattern.split(":"))
    expected = structured(weight.double().numpy(), hessian.double().numpy(), keep, of)
    assert (kept.numpy() == (expected != 0)).mean() > 0.99
    theirs = oracle.relative_error(weight.double().numpy(), expected, hessian.double().numpy())
    assert output_error(weight, pruned, hessian) == pytest.approx(theirs, rel=0.01)


def test_a_pattern_that_does_not_divide_the_columns_removes_less_of_the_last_group() -> None:
    score = torch.tensor([[4.0, 1, 2, 3, 5, 6], [1, 2, 3, 4, 2, 1]])
    none, both = [False] * 2, [True] * 2
    assert lowest_n_of_m(score, Pattern(2, 4)).tolist() == [[False, True, True, False, *none], [*both, *none, *none]]
    assert lowest_n_of_m(score, Pattern(1, 4))[:, 4:].tolist() == [[True, False], [False, True]]


def test_sparsegpt_walks_columns_by_activation() -> None:
    weight, hessian = layer()
    order = torch.argsort(hessian.diagonal(), descending=True)
    ordered = hessian[order][:, order].double().numpy()
    expected = np.empty(weight.shape)
    expected[:, order] = oracle.sparsegpt(weight[:, order].double().numpy(), ordered, 0.5, block=32)
    compressor = SparseGPT([0.5], values="float32", block=32, activation_order=True)
    inputs = Inputs(hessian, 80, activation_order=compressor.activation_order)
    found = compressor.compress(weight, inputs)[0].encoded.decode()
    assert ((found != 0).numpy() == (expected != 0)).mean() > 0.99
    ours = output_error(weight, found, hessian)
    assert ours == pytest.approx(
        oracle.relative_error(weight.double().numpy(), expected, hessian.double().numpy()), 0.01
    )
    assert compressor.settings() != SparseGPT([0.5], values="float32", block=32).settings()
    with pytest.raises(InvalidSettingError, match="2:4"):
        SparseGPT(["2:4"], activation_order=True)


def test_sparsities_are_exact_and_the_ends_are_exact() -> None:
    weight, hessian = layer(rows=31, columns=45)
    levels = parse_sparsities([0, 0.1, 1 / 3, 0.77, 1])
    for level, (pruned, kept) in zip(levels, sparsegpt(weight, factorise(hessian), levels, block=16), strict=True):
        assert int(kept.sum()) == weight.numel() - level.removed(weight.numel())
        assert not pruned[~kept].any()
    most, least = sparsegpt(weight, factorise(hessian), levels, block=16)[:: len(levels) - 1]
    assert not most[0].any()
    assert torch.equal(least[0], weight)


@pytest.mark.parametrize("compressor", [SparseGPT, Magnitude, Wanda])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_patterns_hold_in_every_group(compressor: type[SparseGPT], pattern: str) -> None:
    weight, hessian = layer()
    level = compressor([pattern]).compress(weight, Inputs(hessian, 80))[0]
    keep, of = map(int, pattern.split(":"))
    nonzero = (level.encoded.decode() != 0).view(48, -1, of).sum(2)
    assert (nonzero == keep).all()


def test_pruning_with_corrections_beats_scores_alone_on_correlated_inputs() -> None:
    weight, hessian = layer()
    errors = {}
    for compressor in (SparseGPT([0.5]), Wanda([0.5]), Magnitude([0.5])):
        decoded = compressor.compress(weight, Inputs(hessian, 80))[0].encoded.decode()
        errors[compressor.name] = output_error(weight, decoded, hessian)
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_steps_remove_the_same_number_of_weights_in_every_layer() -> None:
    counts = {}
    for rows in (48, 20):
        weight, hessian = layer(rows=rows)
        levels = SparseGPT([0.5], step=100, steps=3).compress(weight, Inputs(hessian, 80))
        counts[rows] = [level.weights for level in levels]
        assert {b - a for a, b in zip(counts[rows], counts[rows][1:], strict=False)} == {100}
        assert counts[rows][3] == rows * 40


def test_wanda_removes_evenly_in_each_row() -> None:
    weight, hessian = layer()
    decoded = Wanda([0.5]).compress(weight, Inputs(hessian, 80))[0].encoded.decode()
    assert ((decoded != 0).sum(1) == 40).all()


def test_one_scale_a_row_can_be_asked_for_with_a_number() -> None:
    weight, hessian = layer()
    inputs = Inputs(hessian, 80)
    for levels in (GPTQ([3], group_size=0).compress(weight, inputs), RTN([3], group_size=0).compress(weight, inputs)):
        assert levels[0].encoded.tensors()["scale"].shape == (48, 1)
    assert GPTQ([3], group_size=0).settings() == GPTQ([3], group_size=None).settings()
    with pytest.raises(InvalidSettingError, match="-4"):
        GPTQ([3], group_size=-4)


@pytest.mark.parametrize("bits", [[], [0], [9], [3, 3]])
def test_impossible_bits_are_refused(bits: list[int]) -> None:
    with pytest.raises(InvalidSettingError, match="1 to 8"):
        GPTQ(bits)


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, "x", "5:4", "1/0", "nan"])
def test_impossible_sparsities_are_refused(sparsity: float | str) -> None:
    with pytest.raises(InvalidSettingError, match=str(sparsity)):
        parse_sparsities([sparsity])


def test_removed_counts_are_clamped_to_the_layer() -> None:
    from fractions import Fraction

    assert Sparsity("x", Fraction(9, 10), 500).removed(1000) == 1000
    assert Sparsity("x", Fraction(1, 10), -500).removed(1000) == 0


@pytest.mark.parametrize("compressor", [SparseGPT, Magnitude, Wanda])
def test_a_layer_has_the_steps_that_it_has_weights_for(compressor: type[SparseGPT]) -> None:
    weight, hessian = layer(rows=4)  # 320 weights, of which the centre removes 224
    levels = compressor([0.7], step=50, steps=5).compress(weight, Inputs(hessian, 80))
    kept = {level.label: int(level.encoded.decode().count_nonzero()) for level in levels}
    assert kept == {"+1": 46, "+0": 96, "-1": 146, "-2": 196, "-3": 246, "-4": 296}


def test_steps_are_taken_from_a_share_not_from_a_pattern() -> None:
    with pytest.raises(InvalidSettingError, match=r"step=5 .*'2:4' is a pattern: give a sparsity from 0 to 1"):
        parse_sparsities(["2:4"], step=5)


@pytest.mark.parametrize(
    ("one", "other"),
    [([0.5, 0.7], [0.7, 0.5]), (["0.5"], ["0.50"]), ([0.5], [".5"]), ([0], ["0.0"]), ([0.5, "2:4"], ["2:4", "1/2"])],
)
def test_sparsities_are_recorded_alike_however_they_are_given(one: list[float], other: list[float]) -> None:
    assert Magnitude(one).settings() == Magnitude(other).settings()


def test_sparsities_in_rising_order_are_recorded_as_they_are_written() -> None:
    """So that stores that are there stay the same stores."""
    usual: list[float | str] = [0, 0.123456789, 0.3, 1 / 3, 0.5, 1e-7, 1]
    for given in ([0.3, 0.4, 0.5, 0.6, 0.7], ["0.5", "0.75"], ["2:4"], sorted(usual, key=float)):
        assert Magnitude(given).settings()["sparsities"] == [str(value) for value in given]
    assert len({str(Magnitude([s]).settings()) for s in (1 / 3, 0.333333, "1/3")}) == 3
