"""An exported folder beside its weights: configuration, card, and nothing where an export failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evo_hpo.cli.commands import main
from evo_hpo.errors import InvalidSettingError, ModelError
from evo_hpo.export.folder import export_profile
from evo_hpo.models.loading import load_model
from tests.export.test_packed import cache, found, model, settings

__all__ = ["cache", "model"]


def test_an_export_is_as_the_checkpoint_was_beside_its_weights(model: Path, tmp_path: Path) -> None:
    profile, _ = found(tmp_path, settings(model))
    for kept in (True, False):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"use_cache": kept}))
        data = json.loads(profile.read_text())
        data.pop("fingerprint", None)  # of the other configuration
        profile.write_text(json.dumps(data))
        export_profile(profile, tmp_path / f"out-{kept}", check=False)
        assert json.loads((tmp_path / f"out-{kept}/config.json").read_text())["use_cache"] is kept
        (model / "config.json").write_text(json.dumps(config))


def test_the_card_counts_modules_of_every_group_and_bits_over_all_weights(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = {k: v for k, v in settings(model, method="drop").items() if k not in ("levels", "average", "build")}
    profile, _ = found(tmp_path, problem | {"drop": {"attention": 1, "mlp": 2}}, lambda units: (1, 0, 0, 0))
    data = json.loads(profile.read_text()) | {"seed": 7, "settings": {"offspring": 3}}
    profile.write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="0"):
        main(["export", str(profile), str(tmp_path / "out")])
    assert "bytes, 1 of 4 searched modules kept, held-out loss" in " ".join(capsys.readouterr().out.split())
    card = (tmp_path / "out/README.md").read_text()
    size = (tmp_path / "out/model.safetensors").stat().st_size
    weights = load_model(str(model)).model.num_parameters()  # type: ignore[operator]
    assert f"{8 * size / weights:.3f} bits a weight over all {weights:,} weights of the model; 1 of 4 searched" in card
    assert "offspring = 3, seed 7" in card
    assert f"# model = '{model}'" in card
    (tmp_path / "profiles").mkdir()
    (tmp_path / "plan.toml").write_text('name = "of the comparison"')
    export_profile(profile.rename(tmp_path / "profiles/p.json"), tmp_path / "again", check=False)
    assert 'name = "of the comparison"' in (tmp_path / "again/README.md").read_text()


def test_a_failed_export_leaves_no_folders_and_a_tilde_is_the_home(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, _ = found(tmp_path, settings(model))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    export_profile(profile, Path("~/models/mine"), check=False)
    assert (tmp_path / "home/models/mine/config.json").is_file()
    assert not (tmp_path / "~").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(profile), "OUT.GGUF"])
    assert not Path("OUT.GGUF").exists()
    data = json.loads(profile.read_text())
    data["held_out"]["loss"] *= 2
    profile.write_text(json.dumps(data))
    with pytest.raises(ModelError, match="the search found"):
        export_profile(profile, tmp_path / "a/b/out")
    assert not (tmp_path / "a").exists()


def test_sparse_layers_are_dense_and_the_card_says_that_nothing_is_smaller(model: Path, tmp_path: Path) -> None:
    problem = settings(model, method="magnitude", build={}, levels=["2:4", 0.5], average=0.5) | {"levels": [0.25, 0.5]}
    profile, _ = found(tmp_path, problem | {"average": 0.25})
    export_profile(profile, tmp_path / "out", "float32", "compressed-tensors")
    assert "14 sparse and 0 dropped modules are dense, with zeros" in (tmp_path / "out/README.md").read_text()
    kept = json.loads(profile.read_text())["average"]
    assert f"{100 * kept:.4g} % of the searched weights kept" in (tmp_path / "out/README.md").read_text()


def test_a_folder_that_computes_something_else_is_not_left(model: Path, tmp_path: Path) -> None:
    profile, _ = found(tmp_path, settings(model, serve="transformers"))
    data = json.loads(profile.read_text())
    data["held_out"]["loss"] *= 1.1
    profile.write_text(json.dumps(data))
    with pytest.raises(ModelError, match="the search found"):
        export_profile(profile, tmp_path / "out", format="compressed-tensors")
    assert {path.name for path in tmp_path.iterdir()} == {"profile.json"}


def test_names_too_long_for_a_file_are_refused_before_the_model_is_loaded(model: Path, tmp_path: Path) -> None:
    profile, _ = found(tmp_path, settings(model, serve="transformers"))
    with pytest.raises(InvalidSettingError, match="at most 255"):
        export_profile(profile, tmp_path / ("x" * 256))
    export_profile(profile, tmp_path / ("x" * 255), check=False)
