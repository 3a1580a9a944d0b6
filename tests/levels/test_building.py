"""The calibration pass and the build: right statistics, right order, killed builds, every architecture."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.measurements.tiny_architectures import tiny_architecture
from evo_hpo.errors import InvalidSettingError, StoreError
from evo_hpo.levels.blockwise import build_store
from evo_hpo.levels.compressor import Compressor
from evo_hpo.levels.drop import build_drop_store
from evo_hpo.levels.factor import factorise
from evo_hpo.levels.gptq import GPTQSettings, gptq
from evo_hpo.levels.grid import GridSettings
from evo_hpo.levels.hessian import InputStatistics, capture_calls, run_block
from evo_hpo.levels.pruners import SparseGPT, Wanda
from evo_hpo.levels.quantizers import GPTQ, RTN
from evo_hpo.levels.store import open_store
from evo_hpo.models.loading import LoadedModel
from evo_hpo.models.structure import decoder_blocks, is_transposed, linear_modules
from tests.conftest import mixtral
from tests.tiny import ARCHITECTURES, tiny_model

CPU = torch.device("cpu")


def inputs_of(model: nn.Module, name: str, tokens: torch.Tensor) -> torch.Tensor:
    """What a layer reads when the whole model runs at once: tokens x inputs."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.inference_mode():
        model(input_ids=tokens)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral"])
def test_statistics_equal_those_of_the_whole_model(architecture: str, tokens: torch.Tensor) -> None:
    loaded = mixtral() if architecture == "mixtral" else LoadedModel.from_model(tiny_model(architecture))
    model = loaded.model
    blocks = decoder_blocks(model)
    calls = capture_calls(model, blocks, torch.split(tokens, 7))
    for index, (block_name, block) in enumerate(blocks.items()):
        modules = {n: m for n, m in linear_modules(model).items() if n.startswith(f"{block_name}.")}
        with InputStatistics(modules) as statistics:
            run_block(block, index, calls, CPU)
        for name in modules:
            inputs = inputs_of(model, name, tokens)
            found = statistics.of(name)
            assert found is not None
            torch.testing.assert_close(found, inputs.T @ inputs, rtol=1e-3, atol=1e-2)


def test_layers_that_read_the_same_tensor_share_one_sum(llama: LoadedModel, tokens: torch.Tensor) -> None:
    blocks = decoder_blocks(llama.model)
    modules = {n: m for n, m in linear_modules(llama.model).items() if n.startswith("model.layers.0.")}
    calls = capture_calls(llama.model, blocks, torch.split(tokens, 7))
    with InputStatistics(modules, stop_early=True) as statistics:
        run_block(next(iter(blocks.values())), 0, calls, CPU, keep=False)
    assert len({statistics.leader(name) for name in modules}) == 4  # q k v, o, gate up, down
    assert set(statistics.tokens.values()) == {tokens.numel()}


@pytest.mark.parametrize("inputs", ["dense", "3"])
def test_layers_are_calibrated_on_what_they_will_read(
    llama: LoadedModel, tokens: torch.Tensor, tmp_path: Path, inputs: str
) -> None:
    build_store(llama, tmp_path / "s", GPTQ([3, 4], group_size=16), tokens, inputs=inputs, batch_tokens=64)
    store = open_store(tmp_path / "s")
    name = "model.layers.1.self_attn.q_proj"
    reference = LoadedModel.from_model(tiny_model("llama"))
    if inputs == "3":
        for number, unit in enumerate(store.units):
            if ".layers.0." in unit.name:
                weight = store.weights(number, 0)[unit.name]
                assert weight is not None
                reference.model.get_submodule(unit.name).weight.data = weight
    read = inputs_of(reference.model, name, tokens)
    original = reference.model.get_submodule(name).weight
    assert isinstance(original, torch.Tensor)
    expected = gptq(original, factorise(read.T @ read), [4], GPTQSettings(GridSettings(16)))[0].decode()
    found = store.weights([u.name for u in store.units].index(name), 1)[name]
    assert found is not None
    assert (found - expected).abs().gt(1e-6).float().mean() < 0.02


def test_a_build_damps_and_orders_as_its_compressor_says(
    llama: LoadedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    given = {"damping": 0.7, "activation_order": True}
    build_store(llama, tmp_path, GPTQ([3], group_size=16, **given), tokens, inputs="dense", batch_tokens=10**6)  # type: ignore[arg-type]
    store = open_store(tmp_path)
    name = "model.layers.0.mlp.down_proj"
    read, original = inputs_of(llama.model, name, tokens), llama.model.get_submodule(name).weight
    assert isinstance(original, torch.Tensor)
    found = store.weights([u.name for u in store.units].index(name), 0)[name]
    assert found is not None
    for settings in (given, {"damping": 0.7}, {"activation_order": True}):
        factor = factorise(read.T @ read, **settings)
        expected = gptq(original, factor, [3], GPTQSettings(GridSettings(16)))[0].decode()
        assert ((found - expected).abs().gt(1e-6).float().mean() < 0.02) == (settings == given)


@pytest.mark.parametrize(
    ("architecture", "method", "unreached"),
    [
        ("bart", GPTQ([3], group_size=16), "encoder_attn"),
        ("mamba", Wanda([0.5]), "dt_proj"),
        ("mixtral", GPTQ([3]), ""),
    ],
)
def test_layers_that_the_text_never_reaches_are_told_with_what_leaves_them_out(
    architecture: str,
    method: Compressor,
    unreached: str,
    tokens: torch.Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaded = mixtral() if architecture == "mixtral" else LoadedModel.from_model(tiny_architecture(architecture))
    one = tokens[:1, :1]  # of three experts one has no token
    build_store(loaded, tmp_path / "all", method, one, inputs="dense")
    names = [u.name for u in open_store(tmp_path / "all").units]
    idle = [name for name in names if unreached and unreached in name]
    if not unreached:
        assert "never called" not in caplog.text
        return
    assert f"{len(idle)} of {len(names)} layers (such as {idle[0]}) are never called" in caplog.text
    exclude = tomllib.loads(caplog.text[caplog.text.index("exclude = ") : caplog.text.index(" under build")])["exclude"]
    caplog.clear()
    build_store(loaded, tmp_path / "rest", method, one, inputs="dense", exclude=exclude)
    assert [u.name for u in open_store(tmp_path / "rest").units] == [name for name in names if name not in idle]
    assert not caplog.text


def test_the_model_is_left_as_it_was(llama: LoadedModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in llama.model.state_dict().items()}
    build_store(llama, tmp_path, GPTQ([2, 3], group_size=16), tokens, inputs="2")
    assert all(torch.equal(value, before[name]) for name, value in llama.model.state_dict().items())
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in llama.model.modules())


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral"])
def test_every_architecture_builds_and_its_weights_fit(architecture: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    loaded = mixtral() if architecture == "mixtral" else LoadedModel.from_model(tiny_model(architecture))
    build_store(loaded, tmp_path, GPTQ([2, 8], group_size=24), tokens, inputs="8")
    store = open_store(tmp_path, model=loaded.identity)
    assert [unit.name for unit in store.units] == list(linear_modules(loaded.model))
    with torch.inference_mode():
        dense = loaded.model(input_ids=tokens).logits
        for number, unit in enumerate(store.units):
            weight = store.weights(number, 1)[unit.name]
            module = loaded.model.get_submodule(unit.name)
            assert weight is not None
            assert weight.shape == module.weight.shape
            assert is_transposed(module) == (architecture == "gpt2")
            module.weight.data = weight
        compressed = loaded.model(input_ids=tokens).logits
    assert float((compressed - dense).square().mean() / dense.square().mean()) < 0.01


@pytest.mark.parametrize("compressor", [GPTQ([2, 3], group_size=16), SparseGPT([0.5]), Wanda([0.5]), RTN([3])])
def test_a_killed_build_goes_on_and_ends_with_the_same_files(
    llama: LoadedModel, tokens: torch.Tensor, tmp_path: Path, compressor: GPTQ
) -> None:
    inputs = "3" if compressor.name == "gptq" else "dense"
    build_store(llama, tmp_path / "whole", compressor, tokens, inputs=inputs)

    class Killed(Exception):
        pass

    def killer(done: int, total: int, what: str) -> None:
        if done == 10:
            raise Killed

    with pytest.raises(Killed):
        build_store(llama, tmp_path / "parts", compressor, tokens, inputs=inputs, progress=killer)
    with pytest.raises(StoreError, match="not finished"):
        open_store(tmp_path / "parts")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts" / "units").iterdir()}
    assert len(written) == 10
    build_store(llama, tmp_path / "parts", compressor, tokens, inputs=inputs)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    for path in (tmp_path / "whole" / "units").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / "units" / path.name).read_bytes()


def test_a_folder_with_another_plan_is_refused(llama: LoadedModel, tmp_path: Path) -> None:
    build_store(llama, tmp_path, RTN([3]))
    with pytest.raises(StoreError, match="settings"):
        build_store(llama, tmp_path, RTN([4]))


def test_a_folder_calibrated_on_another_text_is_refused(
    llama: LoadedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    build_store(llama, tmp_path, Wanda([0.5]), tokens[:2], text={"text": "mine"})
    with pytest.raises(StoreError, match="calibration text"):
        build_store(llama, tmp_path, Wanda([0.5]), tokens[2:4], text={"text": "mine"})


def test_only_the_chosen_modules_are_built(llama: LoadedModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    build_store(llama, tmp_path, GPTQ([4], group_size=16), tokens, inputs="dense", include=r"mlp", exclude="up_proj")
    names = [unit.name for unit in open_store(tmp_path).units]
    assert names == [f"model.layers.{i}.mlp.{part}_proj" for i in range(3) for part in ("gate", "down")]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral"])
def test_dropped_modules_are_found_everywhere(architecture: str, tmp_path: Path) -> None:
    loaded = mixtral() if architecture == "mixtral" else LoadedModel.from_model(tiny_model(architecture))
    build_drop_store(loaded, tmp_path / "parts")
    store = open_store(tmp_path / "parts")
    layers = len(decoder_blocks(loaded.model))
    assert len(store.units) == 2 * layers
    assert [unit.group for unit in store.units[:2]] == ["attention", "mlp"]
    assert store.space(drop={"attention": 1, "mlp": 0}).budgets == (layers - 1, layers)
    assert store.weights(0, 0) == dict.fromkeys(store.units[0].members)
    assert store.weights(0, 1) == {}
    assert store.space(drop=2).budget == 2 * layers - 2
    build_drop_store(loaded, tmp_path / "blocks", kinds=("block",))
    blocks = open_store(tmp_path / "blocks").units
    assert [u.name for u in blocks] == list(decoder_blocks(loaded.model))
    assert {u.group for u in blocks} == {"block"}


def test_pairs_of_blocks_and_masks(tmp_path: Path) -> None:
    loaded = LoadedModel.from_model(tiny_model("llama"))
    names = list(decoder_blocks(loaded.model))
    build_drop_store(loaded, tmp_path / "pairs", kinds=("pair",))
    assert [u.members for u in open_store(tmp_path / "pairs").units] == [
        tuple(names[:2]),
        *([(names[2],)] * (len(names) == 3)),
    ]
    build_drop_store(loaded, tmp_path / "inner", kinds=("block",), may_drop=r"layers\.1$")
    assert [u.name for u in open_store(tmp_path / "inner").units] == [names[1]]
    with pytest.raises(InvalidSettingError, match="may_drop='nothing' matches none"):
        build_drop_store(loaded, tmp_path / "none", may_drop="nothing")


def test_attention_and_mlp_modules_are_dropped_in_numbers_of_their_own(tmp_path: Path) -> None:
    loaded = LoadedModel.from_model(tiny_model("llama"))
    layers = len(decoder_blocks(loaded.model))
    build_drop_store(loaded, tmp_path / "parts")
    space = open_store(tmp_path / "parts").space(drop={"attention": 1, "mlp": 0})
    assert (space.resources, space.budgets) == (("attention", "mlp"), (layers - 1, layers))
    best = [a for a in space.enumerate() if space.costs(a) == space.budgets]
    assert len(best) == layers  # which attention module goes
    with pytest.raises(InvalidSettingError, match="must give a number for each of: attention, mlp"):
        open_store(tmp_path / "parts").space(drop={"attention": 1})
    with pytest.raises(InvalidSettingError, match=f"mlp has {layers} modules"):
        open_store(tmp_path / "parts").space(drop={"attention": 1, "mlp": layers + 1})


@pytest.mark.parametrize("drop", [2.7, "2.5", -3, 7, "x", True])
def test_what_is_no_number_of_modules_to_drop_is_refused(tmp_path: Path, drop: float) -> None:
    build_drop_store(LoadedModel.from_model(tiny_model("llama")), tmp_path)
    levels = open_store(tmp_path).levels
    for given in ({"average": drop}, {"drop": drop}):
        with pytest.raises(InvalidSettingError, match=f"{drop!r} must be a whole number of units to drop, from 0 to 6"):
            levels.space(**given)  # type: ignore[arg-type]
    assert levels.space(2.0) == levels.space("2") == levels.space(drop=2)
