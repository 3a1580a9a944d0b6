"""Recording: losses as a plain model gives them, nothing lost when killed, the same order when resumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from benchmarks.measurements.landscapes import exploring
from benchmarks.measurements.landscapes.exploring import Exploration
from benchmarks.measurements.landscapes.kept_losses import KeptLosses, Losses
from benchmarks.measurements.landscapes.measuring import LandscapeRecorder
from benchmarks.measurements.landscapes.pack import pack_depth
from benchmarks.problems.depth import DropBlocks, depth_space, ways_to_drop
from evo_hpo.errors import JournalError
from evo_hpo.scoring.sampling import sequences_of
from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit
from tests.tiny import VOCABULARY, random_model, tiny_tokens

BLOCKS = 6


def six_blocks() -> nn.Module:
    """A random Llama whose blocks matter."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48,
    )  # fmt: skip
    return random_model(config, seed=3, spread=0.25)


def plain_losses(tokens: torch.Tensor, kept: Sequence[int]) -> list[float]:
    """KL of each sequence between full logits of the dense model and of one whose blocks were taken out."""
    dense, pruned = six_blocks(), six_blocks()
    layers: Any = pruned.model
    layers.layers = nn.ModuleList(layers.layers[i] for i in kept)
    with torch.no_grad():
        log_p, log_q = (
            torch.log_softmax(m(input_ids=tokens, use_cache=False).logits[:, :-1].double(), dim=-1)
            for m in (dense, pruned)
        )
    return [float(x) for x in (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)]


@pytest.mark.parametrize(("size", "drop"), [(1, 2), (2, 1)])
def test_recorded_losses_are_those_of_a_model_without_the_blocks(size: int, drop: int, tmp_path: Path) -> None:
    tokens = tiny_tokens(sequences=3, length=10)
    space = depth_space(BLOCKS, size, drop)
    said: list[str] = []
    recorder = LandscapeRecorder(
        six_blocks(), DropBlocks(space.units), tokens, tmp_path / "rows", batch=4, say=said.append
    )
    ways = ways_to_drop(len(space), [drop])
    recorded = recorder.losses(ways)
    order = sequences_of(recorder.minibatch, *tokens.shape)
    assert set(ways) == set(space.enumerate())
    for assignment, losses in zip(ways, recorded, strict=True):
        kept = [size * u + i for u, level in enumerate(assignment) if level for i in range(size)]
        assert losses == pytest.approx(plain_losses(tokens[list(order)], kept), rel=1e-4)
    assert said
    again = LandscapeRecorder(six_blocks(), DropBlocks(space.units), tokens, tmp_path / "rows", say=said.append)
    said.clear()
    assert again.losses(ways) == recorded
    assert not said, "everything was in the file"


def test_rows_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    KeptLosses(path, "a model").add({(0, 1): [0.5, 0.25], (1, 0): [1.0, 2.0]})
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    rows = KeptLosses(path, "a model")
    assert rows.found == {(0, 1): (0.5, 0.25)}
    assert rows.missing([(0, 1), (1, 0), (1, 0)]) == [(1, 0)]
    rows.add({(1, 0): [1.0, 2.0]})
    assert path.read_bytes() == whole


def test_rows_of_another_model_are_refused(tmp_path: Path) -> None:
    KeptLosses(tmp_path / "rows.jsonl", "a model")
    with pytest.raises(JournalError, match="another file"):
        KeptLosses(tmp_path / "rows.jsonl", "another model")


def test_an_incomplete_recording_is_not_packed(tmp_path: Path) -> None:
    rows = KeptLosses(tmp_path / "pairs.jsonl", "a model")
    rows.add({a: [1.0] for a in ways_to_drop(15, range(3, 6))[:-1]})
    with pytest.raises(JournalError, match="lacks 1 of 4823"):
        pack_depth(rows.path, "pairs")
    rows.add({ways_to_drop(15, range(3, 6))[-1]: [0.25]})
    arrays = pack_depth(rows.path, "pairs")
    assert arrays["losses"].min() == 0.25
    assert json.loads(arrays["about"])["rows"] == 4823


class Stopped(Exception):
    """Stands for a kill."""


class Measuring:
    """A smooth loss, remembered as a file would, that is killed after some measurements."""

    def __init__(self, limit: int) -> None:
        self.known: dict[Assignment, Losses] = {}
        self.limit = limit

    def __call__(self, assignments: Sequence[Assignment]) -> list[Losses]:
        for a in dict.fromkeys(assignments):
            if a not in self.known:
                if len(self.known) == self.limit:
                    raise Stopped
                weights = np.random.default_rng(1).gamma(1.0, 1.0, len(a))
                self.known[a] = (float(weights @ 4.0 ** -np.array(a)), 1.0)
        return [self.known[a] for a in assignments]


def exploring_space() -> CompressionSpace:
    units = [
        Unit(f"model.layers.{i // 7}.role{i % 7}", tuple(b * (1 + i % 3) for b in (2, 3, 4)), levels=("2", "3", "4"),
             size=1 + i % 3)
        for i in range(210)
    ]  # fmt: skip
    return CompressionSpace.from_average(units, 3.0)


def test_an_exploration_that_was_killed_goes_on_as_if_it_had_not_been(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exploring, "SEARCHES", (("evopress", 60), ("local_search", 60)))
    whole = Measuring(10_000)
    first = Exploration(exploring_space(), whole)
    first.run(30, 1, 16, 2, 8)
    killed = Measuring(20)
    with pytest.raises(Stopped):
        Exploration(exploring_space(), killed).run(30, 1, 16, 2, 8)
    killed.limit = 10_000
    second = Exploration(exploring_space(), killed)
    second.run(30, 1, 16, 2, 8)
    assert list(second.seen.items()) == list(first.seen.items())
    assert set(first.origin.values()) == {"design", "search", "fit"}
    assert all(exploring_space().feasible(a) for a in first.seen)
