"""What can be served, where a level's record alone does not say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.level_set import Choice
from evo_hpo.levels.quantizers import GPTQ
from evo_hpo.levels.serving import SERVERS
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import LoadedModel
from evo_hpo.scoring.expected_levels import Unbuilt
from tests.tiny import random_model

VLLM = SERVERS["vllm"]


@pytest.fixture(scope="module")
def square() -> LoadedModel:
    """Layers of 64 rows: zero points of groups of 16 take as many bits as a number for each column."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    return LoadedModel.from_model(random_model(LlamaConfig(vocab_size=97, num_attention_heads=4, **sizes), spread=0.25))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_groups_that_follow_the_columns_are_told_from_others_by_what_is_stored(
    square: LoadedModel, tokens: torch.Tensor, tmp_path: Path, symmetric: bool, static: bool
) -> None:
    order = {"static_groups": static, "activation_order": True}
    build_store(square, tmp_path, GPTQ([4], group_size=16, symmetric=symmetric, **order), tokens, inputs="dense")
    store = open_store(tmp_path)
    reasons = {VLLM.obstacle(choice) for _, levels in store.levels.rows() for level in levels for choice in level}
    if static:
        assert reasons == {""}
        assert VLLM.served(store.levels).units
        unit = store.manifest.units[0]
        assert not VLLM.obstacle(Choice(Unbuilt(), unit, unit.levels[0]))  # before it is built
    else:
        assert reasons == {"its groups do not follow its columns: build with static_groups = true"}
        with pytest.raises(InvalidSettingError, match="do not follow"):
            VLLM.served(store.levels)
