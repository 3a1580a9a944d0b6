"""The published layout: what is written can be read, also by plain torch, and costs come out the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evo_hpo.errors import StoreError
from evo_hpo.export.published_layout import open_published, read_level_lines, write_level_lines, write_published
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.pruners import Magnitude
from evo_hpo.levels.quantizers import RTN
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import LoadedModel
from evo_hpo.scoring.evaluator import Evaluator


def test_quantized_levels_round_trip(llama: LoadedModel, tmp_path: Path) -> None:
    build_store(llama, tmp_path / "store", RTN([2, 3], group_size=16))
    store = open_store(tmp_path / "store")
    write_published(store, tmp_path / "dense", torch.float32)
    again = open_published(tmp_path / "dense", "bits", llama.model)
    assert list(again.units) == list(store.units)  # in the order of the model, which is not that of the folders
    assert [u.name for u in again.units] != sorted(u.name for u in again.units)
    for number, unit in enumerate(store.units):
        for level in range(2):
            ours, theirs = store.weights(number, level)[unit.name], again.weights(number, level)[unit.name]
            assert torch.equal(ours, theirs)  # type: ignore[arg-type]
            plain = torch.load(tmp_path / "dense" / unit.name / f"{level + 2}.pth", weights_only=True)
            assert torch.equal(plain, theirs)  # type: ignore[arg-type]


def test_sparse_levels_cost_their_weights(llama: LoadedModel, tmp_path: Path) -> None:
    build_store(llama, tmp_path / "store", Magnitude([0.25, 0.5], values="float32"))
    store = open_store(tmp_path / "store")
    write_published(store, tmp_path / "dense", torch.float32)
    again = open_published(tmp_path / "dense", "weights", llama.model)
    assert {u.name: u.costs for u in again.units} == {u.name: u.costs for u in store.units}
    assert again.units[0].levels == ("0", "1")


def test_profiles_round_trip_and_are_checked(llama: LoadedModel, tmp_path: Path) -> None:
    build_store(llama, tmp_path / "store", RTN([2, 3], group_size=16))
    store = open_store(tmp_path / "store")
    assignment = tuple(i % 2 for i in range(len(store.units)))
    path = tmp_path / "profile.txt"
    write_level_lines(path, store, assignment)
    assert path.read_text().splitlines()[1] == "model.layers.0.self_attn.k_proj: 3"
    assert read_level_lines(path, store) == assignment
    write_level_lines(path, store.levels.tied(), (1,) * len(store.levels.tied().units))
    assert read_level_lines(path, store) == (1,) * len(store.units)
    path.write_text(path.read_text().replace("q_proj: 3", "q_proj: 7", 1))
    with pytest.raises(StoreError, match="q_proj"):
        read_level_lines(path, store)
    path.write_text("model.layers.9.x: 3\n")
    with pytest.raises(StoreError, match="levels 2, 3"):
        read_level_lines(path, store)


def test_what_does_not_fit_is_refused_by_name(llama: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no <layer>"):
        open_published(tmp_path, "bits", llama.model)
    layer = tmp_path / "model.layers.0.mlp.up_proj"
    layer.mkdir()
    (layer / "3.pth").write_bytes(b"nonsense")
    with pytest.raises(StoreError, match=r"cannot read .*3\.pth"):
        open_published(tmp_path, "bits", llama.model)
    torch.save(torch.zeros(3, 4), layer / "3.pth")
    with pytest.raises(StoreError, match=r"3\.pth.*\(48, 32\)"):
        open_published(tmp_path, "bits", llama.model)
    torch.save(torch.zeros(48, 32), (layer / "3.pth").rename(layer / "3.5.pth"))
    with pytest.raises(StoreError, match=r"3\.5\.pth' must be called by its bits"):
        open_published(tmp_path, "bits", llama.model)
    assert open_published(tmp_path, "weights", llama.model).units[0].levels == ("3.5",)
    layer.rename(tmp_path / "model.layers.7.mlp.up_proj")
    with pytest.raises(StoreError, match=r"layers\.7.*no linear layer"):
        open_published(tmp_path, "bits", llama.model)


def test_a_published_folder_and_profile_are_scored_like_our_own(
    llama: LoadedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    build_store(llama, tmp_path / "store", RTN([2, 3], group_size=16))
    store = open_store(tmp_path / "store")
    write_published(store, tmp_path / "dense", torch.float32)
    write_level_lines(tmp_path / "profile.txt", store, tuple(i % 3 % 2 for i in range(len(store.units))))
    published = open_published(tmp_path / "dense", "bits", llama.model)
    losses = []
    for levels in (store, published):
        evaluator = Evaluator(llama.model, levels, tokens)
        figures = evaluator.evaluate_held_out(read_level_lines(tmp_path / "profile.txt", levels), tokens)
        evaluator.close()
        losses.append(figures["loss"])
    assert losses[0] == losses[1] > 0
