"""Builds on an accelerator (a stand-in that refuses to mix places), one block at a time, and in every dtype."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.compressor import Compressor
from evo_hpo.levels.hessian import InputStatistics, capture_calls, run_block
from evo_hpo.levels.pruners import SparseGPT, Wanda
from evo_hpo.levels.quantizers import GPTQ, RTN
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import LoadedModel
from evo_hpo.models.structure import decoder_blocks, linear_modules
from tests.conftest import mixtral
from tests.levels.accelerator import StandIn, on_accelerator
from tests.tiny import tiny_model

COMPRESSORS = [
    GPTQ([1, 2, 3, 8], group_size=12),
    GPTQ([3, 4], group_size=16, static_groups=False, activation_order=True),
    SparseGPT([0, 0.5, 1, "2:4"]),
    SparseGPT([0.5], activation_order=True),
    Wanda([0.5, "2:4"]),
]


def test_the_stand_in_refuses_to_mix() -> None:
    with StandIn():
        there, here = torch.ones(3).to("cuda"), torch.ones(3)
        assert there.device.type == "cuda"
        assert (there * 2 + torch.ones(3, device=there.device)).device.type == "cuda"
        assert there.cpu().device == here.device
        with pytest.raises(RuntimeError, match="and on the CPU"):
            there + here


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: f"{c.name}-{len(c.labels)}")
@pytest.mark.parametrize("model", ["llama", "gpt2", "mixtral"])
def test_a_build_keeps_one_block_on_the_accelerator(
    model: str, compressor: Compressor, tokens: torch.Tensor, tmp_path: Path
) -> None:
    made = [mixtral() if model == "mixtral" else LoadedModel.from_model(tiny_model(model)) for _ in range(2)]
    blocks = decoder_blocks(made[0].model)
    seen: list[str] = []

    def look(name: str) -> Any:
        def hook(block: nn.Module, _: Any) -> None:
            resident = {b for b, module in blocks.items() if any(on_accelerator(p) for p in module.parameters())}
            if resident:  # not the look at what blocks return
                assert resident == {name}
                assert all(on_accelerator(p) for p in block.parameters())
                seen.append(name)

        return hook

    for name, block in blocks.items():
        block.register_forward_pre_hook(look(name))
    inputs = "3" if compressor.name == "gptq" else "dense"
    with StandIn():
        build_store(made[0], tmp_path / "there", compressor, tokens, inputs=inputs, device="cuda")
        assert not any(on_accelerator(p) for p in made[0].model.parameters())
    assert list(dict.fromkeys(seen)) == list(blocks)
    build_store(made[1], tmp_path / "here", compressor, tokens, inputs=inputs)
    for path in (tmp_path / "here" / "units").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / "units" / path.name).read_bytes()


@pytest.mark.parametrize("compressor", [GPTQ([1, 3, 6], group_size=12, symmetric=True), SparseGPT([0.5])])
@pytest.mark.parametrize("memory", ["resident", "packed", 4000])
def test_a_store_decodes_on_the_accelerator(
    llama: LoadedModel,
    tokens: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compressor: Compressor,
    memory: Any,
) -> None:
    build_store(llama, tmp_path, compressor, tokens, inputs="dense")
    monkeypatch.setattr(
        "evo_hpo.levels.store.load_file",
        lambda path, device: {k: v.to(device) for k, v in load_file(path, device="cpu").items()},
    )
    here = open_store(tmp_path)
    with StandIn():
        there = open_store(tmp_path, memory=memory, device="cuda")
        for number, unit in enumerate(there.units[:7]):
            for level in range(len(unit.levels)):
                found = there.weights(number, level)[unit.name]
                assert found is not None
                assert on_accelerator(found)
                assert torch.equal(found.cpu(), here.weights(number, level)[unit.name])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_of_every_dtype_are_solved_in_single_precision(
    dtype: torch.dtype, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model: Any = tiny_model("llama").to(dtype)
    blocks = decoder_blocks(model)
    calls = capture_calls(model, blocks, torch.split(tokens, 7))
    with InputStatistics(linear_modules(model, include=r"layers\.0\.")) as statistics:
        run_block(next(iter(blocks.values())), 0, calls, torch.device("cpu"))
    assert calls[0].hidden.dtype == dtype
    sums = statistics.of("model.layers.0.self_attn.q_proj")
    assert sums is not None
    assert sums.dtype == torch.float32

    loaded = LoadedModel.from_model(model)
    build_store(loaded, tmp_path / "own", GPTQ([3, 4, 8], group_size=16), tokens, inputs="4")
    build_store(
        LoadedModel.from_model(model.to(torch.float32)),
        tmp_path / "wide",
        GPTQ([3, 4, 8], group_size=16),
        tokens,
        inputs="4",
    )
    own, wide = open_store(tmp_path / "own", dtype=dtype), open_store(tmp_path / "wide")
    for number, unit in enumerate(own.units):
        weight = own.weights(number, 0)[unit.name]
        assert weight is not None
        assert weight.dtype == dtype
        errors = own.errors[number]
        assert list(errors) == sorted(errors, reverse=True)
        assert errors == pytest.approx(wide.errors[number], rel=0.15)  # the same weights, on inputs of another dtype


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("compressor", "inputs"),
    [
        (GPTQ([2, 3], group_size=12), "3"),
        (GPTQ([2, 3], group_size=12, activation_order=True), "dense"),
        (SparseGPT([0.5]), "dense"),
        (RTN([3]), None),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_several_devices_build_the_store_of_one(
    compressor: Compressor, inputs: str | None, count: int, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """Also where the build is killed in the middle: what is written stays, and is whole."""
    devices, where = ["cpu"] * count, (tmp_path / "one", tmp_path / "several")
    told: list[tuple[int, str]] = []

    def killer(done: int, total: int, what: str) -> None:
        if done == 9:
            raise KeyboardInterrupt

    given: dict[str, Any] = {"inputs": inputs}
    build_store(mixtral(), where[0], compressor, tokens, **given)
    with pytest.raises(KeyboardInterrupt):
        build_store(mixtral(), where[1], compressor, tokens, device=devices, progress=killer, **given)
    written = {path: path.stat().st_mtime_ns for path in (where[1] / "units").iterdir()}
    assert len(written) >= 9
    assert not [t for t in threading.enumerate() if t.name.startswith("device")]
    hear = lambda done, total, what: told.append((done, what))  # noqa: E731
    build_store(mixtral(), where[1], compressor, tokens, device=",".join(devices), progress=hear, **given)
    one, several = (open_store(folder) for folder in where)
    assert [done for done, what in told if what.endswith(("proj", "w1", "w2", "w3"))] == list(
        range(len(written) + 1, len(one.units) + 1)
    )
    assert several.fingerprint == one.fingerprint
    assert (where[1] / "manifest.json").read_bytes() == (where[0] / "manifest.json").read_bytes()
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_layers_are_compressed_at_the_same_time_and_while_the_text_goes_on(
    llama: LoadedModel, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers that wait for each other are compressed on two devices, and the last one of a block for the next."""
    together, passed, threads = threading.Barrier(2, timeout=60), threading.Event(), set[int]()
    calls = itertools.count()
    second = list(decoder_blocks(llama.model).values())[1]
    second.register_forward_pre_hook(lambda block, _: None if "forward" in vars(block) else passed.set())

    class Waiting(Wanda):
        def compress(self, weight: torch.Tensor, inputs: Any) -> list[Any]:
            threads.add(threading.get_ident())
            if next(calls) < 2:  # the first block's
                together.wait()
                assert passed.wait(60)
            return super().compress(weight, inputs)

    only: dict[str, Any] = {"include": r"layers\.[01]\.self_attn\.[qk]_proj", "inputs": "dense"}
    build_store(llama, tmp_path, Waiting([0.5]), tokens, device="cpu,cpu", **only)
    assert len(threads) == 2
    assert threading.get_ident() not in threads


def test_a_layer_that_fails_on_one_of_several_devices_is_named(tokens: torch.Tensor, tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.up_proj.weight' holds values that are not finite"):
        build_store(
            LoadedModel.from_model(model), tmp_path / "a", Wanda([0.5]), tokens, inputs="dense", device="cpu,cpu"
        )
    with pytest.raises(InvalidSettingError, match="device='tpu' cannot be used"):
        build_store(LoadedModel.from_model(model), tmp_path / "b", RTN([3]), device="cpu,tpu")
    assert not (tmp_path / "b").exists()
