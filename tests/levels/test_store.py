"""Opening stores: what is damaged is refused by name, memory modes agree, spaces count what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from evo_hpo.errors import InvalidSettingError, StoreError
from evo_hpo.levels import joined, open_store
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.drop import build_drop_store
from evo_hpo.levels.level_set import Choice, LevelSet
from evo_hpo.levels.manifest import LevelRecord, UnitRecord
from evo_hpo.levels.pruners import Magnitude
from evo_hpo.levels.quantizers import RTN
from evo_hpo.levels.store import LevelStore
from evo_hpo.models.loading import LoadedModel
from evo_hpo.scoring.expected_levels import Unbuilt
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores")
    llama = LoadedModel.from_model(tiny_model("llama"))
    build_store(llama, path / "rtn", RTN([2, 3, 4], group_size=16))
    build_store(llama, path / "magnitude", Magnitude([0, 0.25, 0.5]))
    return path


def copy(source: Path, target: Path) -> Path:
    (target / "units").mkdir(parents=True)
    for path in source.rglob("*.*"):
        (target / path.relative_to(source)).write_bytes(path.read_bytes())
    return target


def read_whole(store: LevelStore, read: Callable[[int, int], object] | None = None) -> None:
    """Every level of every unit, so every file and its checksum."""
    for unit, record in enumerate(store.manifest.units):
        for level in range(len(record.levels)):
            (read or store.encoded)(unit, level)


def test_memory_modes_give_the_same_weights(folder: Path) -> None:
    modes = [open_store(folder / "rtn", memory=memory) for memory in ("resident", "packed", 20_000)]
    read_whole(modes[0], modes[0].weights)
    for unit in range(len(modes[0].units)):
        for level in (2, 0, 1, 2):
            found = [next(iter(store.weights(unit, level).values())) for store in modes]
            assert all(torch.equal(found[0], other) for other in found[1:])  # type: ignore[arg-type]
    assert modes[0].weights(0, 0) is not None
    first, again = (modes[0].weights(0, 1)[modes[0].units[0].name] for _ in range(2))
    assert first is again  # resident: a reference, not a copy
    assert modes[2]._bytes <= 20_000


def test_packed_levels_are_the_mapped_files(folder: Path) -> None:
    """So processes of a machine that hold the same store share its memory."""
    store = open_store(folder / "rtn", memory="packed")
    file = folder / "rtn" / store.manifest.units[0].file
    at = store.encoded(0, 1)[store.units[0].name].tensors()["codes"].data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
    ends = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    assert any(start <= at < end for start, end in ends)


def test_weights_come_in_the_compute_dtype(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = next(iter(open_store(folder / "magnitude", dtype=dtype).weights(3, 1).values()))
        assert weight is not None
        assert weight.dtype == dtype


def test_a_short_file_is_refused_by_name_at_once(folder: Path, tmp_path: Path) -> None:
    damaged = copy(folder / "rtn", tmp_path / "s")
    path = damaged / "units" / "model.layers.1.mlp.up_proj.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"model\.layers\.1\.mlp\.up_proj"):
        open_store(damaged)
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        open_store(damaged)


def test_a_flipped_bit_is_refused_by_name_when_read(folder: Path, tmp_path: Path) -> None:
    damaged = copy(folder / "rtn", tmp_path / "s")
    path = damaged / "units" / "model.layers.0.mlp.up_proj.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))
    store = open_store(damaged)
    for read in (store.encoded, store.weights):
        with pytest.raises(StoreError, match=r"model\.layers\.0\.mlp\.up_proj"):
            read_whole(store, read)


def test_a_damaged_or_missing_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    damaged = copy(folder / "rtn", tmp_path / "s")
    whole = (damaged / "manifest.json").read_bytes()
    for data in (
        whole[:200],
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'{"plan": []}',
        whole.replace(b'"units": [', b'"units": [3, '),
    ):
        (damaged / "manifest.json").write_bytes(data)
        with pytest.raises(StoreError, match="damaged manifest"):
            open_store(damaged)
    (damaged / "manifest.json").write_bytes(whole.replace(b'"format": 1', b'"format": 99'))
    with pytest.raises(StoreError, match="has format 99, this version reads 1"):
        open_store(damaged)
    with pytest.raises(StoreError, match="build one first"):
        open_store(tmp_path / "nothing")


def test_another_models_store_is_refused(folder: Path) -> None:
    with pytest.raises(StoreError, match="another|rebuild"):
        open_store(folder / "rtn", model={"model weights": "0" * 16})


def test_fingerprints_follow_content(folder: Path, tmp_path: Path) -> None:
    assert open_store(folder / "rtn").fingerprint == open_store(copy(folder / "rtn", tmp_path / "s")).fingerprint
    assert open_store(folder / "rtn").fingerprint != open_store(folder / "magnitude").fingerprint


def test_average_bits_become_an_exact_budget(folder: Path) -> None:
    store = open_store(folder / "rtn")
    size = sum(unit.size for unit in store.units)
    space = store.space(2.7)
    assert space.budget == int(Fraction("2.7") * size)
    assert space.cost((1,) * len(store.units)) == 3 * size
    assert [unit.levels for unit in store.units[:1]] == [("2", "3", "4")]


def test_sparsity_becomes_a_number_of_weights(folder: Path) -> None:
    store = open_store(folder / "magnitude")
    size = sum(unit.size for unit in store.units)
    assert store.space(0.3).budget == store.space(sparsity=0.3).budget == int(Fraction("0.7") * size)
    assert store.units[0].levels == ("0.5", "0.25", "0")
    assert store.units[0].costs[2] == store.units[0].size


def test_storage_bits_can_be_the_budget(folder: Path) -> None:
    levels = open_store(folder / "rtn").levels.counted_in("storage")
    stored = json.loads((folder / "rtn" / "manifest.json").read_text())["units"][0]["levels"]
    assert levels.units[0].costs == tuple(level["storage"] for level in stored)
    assert stored[0]["storage"] > 2 * levels.units[0].size


def test_tied_units_share_a_level(folder: Path) -> None:
    store = open_store(folder / "rtn")
    tied = store.levels.tied()
    assert [unit.name.split(".", 3)[3] for unit in tied.units[:4]] == [
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ]
    assert len(tied.units[0].members) == 3
    assert tied.units[0].size == sum(store.units[i].size for i in range(3))
    assert sum(unit.size for unit in tied.units) == sum(unit.size for unit in store.units)
    weights = tied.weights(0, 1)
    for number in range(3):
        name = store.units[number].name
        assert torch.equal(weights[name], store.weights(number, 1)[name])  # type: ignore[arg-type]


def test_stores_join_into_one_space_with_dropped_units(folder: Path) -> None:
    rtn, magnitude = open_store(folder / "rtn"), open_store(folder / "magnitude")
    both = joined([rtn.levels.with_dropped(), magnitude.levels.select(labels=["0.5"])])
    unit = both.units[0]
    assert unit.levels == ("dropped", "2", "3", "4", "0.5")
    assert unit.costs == (0, 2 * unit.size, 3 * unit.size, 4 * unit.size, 8 * unit.size)
    assert both.weights(0, 0) == {unit.name: None}
    assert torch.equal(both.weights(0, 2)[unit.name], rtn.weights(0, 1)[unit.name])  # type: ignore[arg-type]
    assert torch.equal(both.weights(0, 4)[unit.name], magnitude.weights(0, 0)[unit.name])  # type: ignore[arg-type]
    assert both.space(3).feasible((2,) * len(both.units))
    twice = joined([rtn.levels, rtn.levels], prefixes=["a", "b"])
    assert twice.units[0].levels == ("a2", "b2", "a3", "b3", "a4", "b4")
    with pytest.raises(StoreError, match="prefixes"):
        joined([rtn.levels, rtn.levels])
    with pytest.raises(StoreError, match="dropped modules cannot be joined with levels of their layers"):
        joined([rtn.levels, magnitude.levels.counted_in("modules")])


def test_levels_and_units_can_be_selected(folder: Path) -> None:
    levels = open_store(folder / "rtn").levels.select(labels=["2", "4"], include=r"layers\.1\.")
    assert {unit.levels for unit in levels.units} == {("2", "4")}
    assert len(levels.units) == 7
    with pytest.raises(InvalidSettingError, match="leave nothing"):
        levels.select(labels=["7"])


def test_a_budget_in_the_wrong_resource_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidSettingError, match="weights"):
        open_store(folder / "rtn").space(sparsity=0.5)
    with pytest.raises(InvalidSettingError, match="exactly one"):
        open_store(folder / "rtn").space()


def test_levels_of_equal_cost_are_the_ones_they_are_labelled(tmp_path: Path) -> None:
    llama = LoadedModel.from_model(tiny_model("llama"))
    build_store(llama, tmp_path, Magnitude(["2:4", 0.5, "1:2"]))
    store = open_store(tmp_path)
    for number, unit in enumerate(store.units):
        assert len(set(unit.costs)) == 1
        for level, label in enumerate(unit.levels):
            weight = store.weights(number, level)[unit.name]
            assert weight is not None
            kept = set((weight != 0).view(len(weight), -1, 2).sum(2).flatten().tolist())
            assert (kept == {1}) == (label == "1:2")
        assert list(store.errors[number]) == sorted(store.errors[number], reverse=True)


def test_uniform_compression_at_a_stored_sparsity_fits_the_budget_of_that_sparsity(tmp_path: Path) -> None:
    loaded = LoadedModel.from_model(tiny_model("llama"))
    build_store(loaded, tmp_path / "sparse", Magnitude([0.3, 0.7]))
    space = open_store(tmp_path / "sparse").space(sparsity=0.3)
    exact = 0.7 * space.total_size
    assert {space.units[i].levels[level] for i, level in enumerate(space.uniform())} == {"0.3"}
    assert exact < space.budget < exact + len(space.units)  # each layer rounds up what it keeps
    between = open_store(tmp_path / "sparse").space(sparsity=0.5)
    assert between.budget == between.total_size // 2


def test_uniform_compression_of_steps_is_within_the_budget_of_their_centre_under_any_name(tmp_path: Path) -> None:
    loaded = LoadedModel.from_model(tiny_model("llama"))
    build_store(loaded, tmp_path / "steps", Magnitude([0.7], step=20, steps=2))
    build_store(loaded, tmp_path / "plain", Magnitude([0.5, 0.7]))
    steps, plain = (open_store(tmp_path / name) for name in ("steps", "plain"))
    both = joined([steps.levels, plain.levels], resource="weights", prefixes=["a ", "b "])
    for levels, label in ((steps.levels, "+0"), (both, "a +0"), (both, "b 0.7"), (both.tied(), "b 0.7")):
        space = levels.space(sparsity=0.7)
        uniform = tuple(unit.levels.index(label) for unit in levels.units)
        weights = [w for unit, level in enumerate(uniform) for w in levels.weights(unit, level).values()]
        kept = sum(int(weight.count_nonzero()) for weight in weights if weight is not None)
        assert space.feasible(uniform)
        assert space.budget == kept
        assert kept > 0.3 * space.total_size  # rounded up, layer by layer


@pytest.mark.parametrize("sparsity", [-1, 1.01, "x", "2:4", "1/0", float("nan")])
def test_what_is_no_sparsity_is_refused(folder: Path, sparsity: float) -> None:
    store = open_store(folder / "magnitude")
    for given in ({"average": sparsity}, {"sparsity": sparsity}):
        with pytest.raises(InvalidSettingError, match=f"sparsity {sparsity!r} must be a number from 0 to 1"):
            store.space(**given)


def test_weights_that_two_units_hold_are_not_counted_twice(folder: Path, tmp_path: Path) -> None:
    llama = LoadedModel.from_model(tiny_model("llama"))
    build_drop_store(llama, tmp_path)
    rtn, magnitude = open_store(folder / "rtn").levels, open_store(folder / "magnitude").levels
    for dropped in (open_store(tmp_path).levels.counted_in("bits"), magnitude.tied()):
        for sets in ([rtn, dropped], [dropped, rtn]):
            with pytest.raises(StoreError, match=r"units '\S+' and '\S+' both hold '\S+', .* counted twice"):
                joined(sets)
    assert len(joined([rtn.tied(), magnitude.tied()]).units) == 4 * 3
    halves = [rtn.select(include=part) for part in ("attn", "mlp")]
    assert len(joined(halves).units) == len(rtn.units)


def test_units_of_unequal_size_are_tied_over_the_steps_that_all_of_them_have(tmp_path: Path) -> None:
    loaded = LoadedModel.from_model(tiny_model("llama"))
    build_store(loaded, tmp_path, Magnitude([0.7], step=100, steps=4))
    store = open_store(tmp_path)
    labels = {unit.name.rsplit(".", 1)[1]: unit.levels for unit in store.units[:3]}
    assert len(labels["k_proj"]) < len(labels["q_proj"])
    tied = store.levels.tied()
    assert tied.units[0].levels == labels["k_proj"]
    for level, label in enumerate(tied.units[0].levels):
        for name, weight in tied.weights(0, level).items():
            number = next(i for i, unit in enumerate(store.units) if unit.name == name)
            alone = store.weights(number, store.units[number].levels.index(label))[name]
            assert torch.equal(weight, alone)  # type: ignore[arg-type]
    apart = LevelSet([(n, rows[: 1 if "q_proj" in n else 99]) for n, rows in store.levels.rows()], "weights")
    with pytest.raises(StoreError, match="qkv_proj.* share no level"):
        apart.select(include="q_proj|v_proj").tied()


def test_a_dropped_layer_is_zeros_of_ggml_where_any_of_its_levels_is_of_a_ggml_type() -> None:
    def levels(kind: str, **settings: Any) -> LevelSet:
        level = LevelRecord(
            kind, 16 * 64, 64, 1, {"ggml": 40_000, "sparse": 900}[kind], 0.1, {"kind": kind, **settings}
        )
        unit = UnitRecord("layers.0.up_proj", ("layers.0.up_proj",), (256, 256), 65_536, False, (level,))
        return LevelSet([(unit.name, [[Choice(Unbuilt(), unit, level)]])], "bits")

    both = joined([levels("sparse"), levels("ggml", type="Q4_0")]).with_dropped().counted_in("bytes")
    dropped = both.units[0].levels.index("dropped")
    assert both.units[0].costs[dropped] == 256 * 256 // 32 * 18
