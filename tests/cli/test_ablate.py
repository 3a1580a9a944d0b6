"""`evo-hpo ablate`: what varies is in the plan that is kept, and what would not be heeded is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from evo_hpo.cli import search_commands
from evo_hpo.record.comparison import Comparison
from evo_hpo.run.plan_file import PlanFile
from tests.cli.test_cli import run, unreported, write_plan

__all__ = ["unreported"]


@pytest.mark.usefixtures("unreported")
def test_a_plan_with_an_ablation_of_its_own_can_be_varied(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    ablation = '[ablation]\nsearcher = "evopress"  # ours\n[ablation.vary]\nmax_switches = [\n  1,  # few\n  3,\n]\n'
    plan.write_text(plan.read_text() + ablation)
    options = ("--root", tmp_path, "--no-track", "--workers", "1")
    assert run("ablate", plan, "--vary", "offspring=2,8", "--searcher", "evopress", *options) == 0
    kept = PlanFile.read(tmp_path / "tiny-ablation" / "plan.toml").plan()
    searches = {s.id for s in Comparison.read(tmp_path / "tiny-ablation").searches}
    assert {t.id for t in kept.planned()} == searches
    assert any("offspring-8" in name for name in searches)
    assert not any("max_switches" in name for name in searches)


@pytest.mark.parametrize(
    ("vary", "expected"),
    [
        (["offspring=4", "offspring=16,64"], {"offspring": [4, 16, 64]}),
        (["offspring=2", 'init=["uniform", "random"]'], {"offspring": [2], "init": ["uniform", "random"]}),
        (["offspring=[2,8]", "init=uniform,random"], {"offspring": [2, 8], "init": ["uniform", "random"]}),
    ],
)
def test_every_value_that_is_to_vary_is_varied(
    vary: list[str], expected: dict[str, list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    varied: list[PlanFile] = []
    monkeypatch.setattr(search_commands, "_forecast", varied.append)
    options = [word for pair in vary for word in ("--vary", pair)]
    assert run("ablate", write_plan(tmp_path), "--searcher", "evopress", *options, "--dry-run") == 0
    assert varied[0].data["ablation"]["vary"] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vary", "init=[uniform,random]"], 'is no TOML list: write init=a,b, or init=["a", "b"]'),
        (["--vary", "=4"], "--vary must be KEY=V1,V2"),
        (["--searcher", "nonsense", "--grid"], "--searcher goes with --vary"),
        (["--grid"], "--grid goes with --vary"),
    ],
)
def test_what_ablate_would_not_heed_is_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(tmp_path)
    plan.write_text(plan.read_text() + '[ablation]\nsearcher = "evopress"\n[ablation.vary]\noffspring = [2, 8]\n')
    assert run("ablate", plan, *options, "--dry-run") == 2
    assert message in capsys.readouterr().err
    assert run("ablate", plan, "--dry-run") == 0
