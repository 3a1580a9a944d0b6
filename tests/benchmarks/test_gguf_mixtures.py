"""llama-quantize's mixtures, as the measurement of GGUF files makes them of a store's levels."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks.measurements.compression.gguf_mixtures import BASES, assignment_of, mixed_type
from evo_hpo.levels.ggml import GGML_TYPES, block_size, row_bytes
from evo_hpo.levels.level_set import Choice, LevelSet
from evo_hpo.levels.manifest import LevelRecord, UnitRecord
from evo_hpo.space.amounts import Amount

PLAN = tomllib.loads((Path(__file__).parents[2] / "benchmarks" / "plans" / "smollm2-gguf.toml").read_text())
SMOLLM2 = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576)}
SMOLLM2 |= {"self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576)}
SMOLLM2 |= {"mlp.down_proj": (576, 1536)}


ROLES = {
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    "self_attn.o_proj": "attn_output",
}
RECORD = json.loads((Path(__file__).parent / "llama_quantize_types.json").read_text())


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


def recorded(model: str, mixture: str) -> dict[tuple[str, int], str]:
    """(Role, block) -> the type that llama-quantize gave it."""
    return {
        (role, block): kind
        for role, of in RECORD[model][mixture].items()
        for kind, ranges in of.items()
        for block in numbers(ranges)
    }


def numbers(ranges: str) -> Iterator[int]:
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


@pytest.mark.parametrize("mixture", BASES)
def test_mixtures_have_the_types_that_llama_quantize_gave(mixture: str, levels: LevelSet) -> None:
    expected = recorded("smollm2", mixture)
    assert expected.pop(("token_embd", 0)) == "Q8_0"
    chosen = zip(levels.units, assignment_of(mixture, levels), strict=True)
    assert {(ROLES[unit.role], unit.block): unit.levels[level] for unit, level in chosen} == expected
    wide = recorded("16 blocks with rows of 256", mixture)
    for role, name in ROLES.items():
        for block in range(16):
            assert mixed_type(mixture, role, block, 16) == wide[name, block], (role, block)


def test_the_plan_asks_for_no_more_bytes_than_a_mixture_takes(levels: LevelSet) -> None:
    settings = PLAN["problems"][0]["settings"]
    chosen = assignment_of("Q3_K_M", levels)
    bits = [unit.costs[level] for unit, level in zip(levels.units, chosen, strict=True)]
    searched = Fraction(sum(cost for cost in bits if isinstance(cost, int)), 8)
    mixture = searched + 32_007_232  # embedding, head, norms and header of SmolLM2's file, as docs/serve.md has them
    assert abs(mixture - 93_510_176) < 1024  # what was written; the header is counted from above or below
    assert Fraction(9998, 10000) * mixture < Amount.of(settings["size"]).bytes <= mixture
    assert set(BASES.values()) <= set(settings["levels"])
