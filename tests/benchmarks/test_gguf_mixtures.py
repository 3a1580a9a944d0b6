"""llama-quantize's mixtures, as the measurement of GGUF files makes them of a store's levels."""

from __future__ import annotations

import tomllib
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks.measurements.compression.gguf_mixtures import BASES, assignment_of
from evo_hpo.levels.ggml import GGML_TYPES, block_size, row_bytes
from evo_hpo.levels.level_set import Choice, LevelSet
from evo_hpo.levels.manifest import LevelRecord, UnitRecord
from evo_hpo.space.amounts import Amount

PLAN = tomllib.loads((Path(__file__).parents[2] / "benchmarks" / "plans" / "smollm2-gguf.toml").read_text())
SMOLLM2 = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576)}
SMOLLM2 |= {"self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576)}
SMOLLM2 |= {"mlp.down_proj": (576, 1536)}


class NoWeights:
    """Levels that are only counted."""

    def unit_weights(self, unit: str, label: str) -> dict[str, None]:
        return {}

    def unit_encoded(self, unit: str, label: str) -> None:
        return None


@pytest.fixture(scope="module")
def levels() -> LevelSet:
    rows = []
    for block in range(30):
        for role, (height, width) in SMOLLM2.items():
            name, size = f"model.layers.{block}.{role}", height * width
            bits = {t: 8 * height * row_bytes(t, width) for t in GGML_TYPES if width % block_size(t) == 0}
            found = tuple(LevelRecord(t, cost, size, 1, cost, 0.0) for t, cost in bits.items())
            record = UnitRecord(name, (name,), (height, width), size, False, found)
            rows.append((name, [[Choice(NoWeights(), record, level)] for level in found]))
    return LevelSet(rows, "bits")


def test_mixtures_have_the_types_of_llama_quantize(levels: LevelSet) -> None:
    for mixture, down, gate, value in (
        ("Q4_K_M", {"Q4_K": 16, "Q6_K": 14}, "Q5_0", {"Q5_0": 16, "Q8_0": 14}),
        ("Q3_K_M", {"Q4_K": 29, "Q5_K": 1}, "IQ4_NL", {"Q5_0": 28, "Q5_1": 2}),
        ("Q4_K_S", {"Q4_K": 27, "Q5_K": 3}, "Q5_0", {"Q5_0": 26, "Q5_1": 4}),
    ):
        chosen: dict[str, dict[str, int]] = {}
        for unit, level in zip(levels.units, assignment_of(mixture, levels), strict=True):
            counts = chosen.setdefault(unit.role, {})
            counts[unit.levels[level]] = counts.get(unit.levels[level], 0) + 1
        assert chosen["mlp.down_proj"] == down
        assert chosen["mlp.gate_proj"] == {gate: 30}
        assert chosen["self_attn.v_proj"] == value


def test_the_plan_asks_for_no_more_bytes_than_a_mixture_takes(levels: LevelSet) -> None:
    settings = PLAN["problems"][0]["settings"]
    chosen = assignment_of("Q3_K_M", LevelSet(levels.select(labels=settings["levels"]).rows(), "bits"))
    bits = [
        unit.costs[level] for unit, level in zip(levels.select(labels=settings["levels"]).units, chosen, strict=True)
    ]
    searched = Fraction(sum(cost for cost in bits if isinstance(cost, int)), 8)
    mixture = searched + 32_007_232  # embedding, head, norms and header of SmolLM2's file, as docs/serve.md has them
    assert abs(mixture - 93_510_176) < 1024  # what was written; the header is counted from above or below
    assert Fraction(9998, 10000) * mixture < Amount.of(settings["size"]).bytes <= mixture
    assert set(BASES.values()) <= set(settings["levels"])
