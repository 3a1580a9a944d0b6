"""A dry run: what it says of tokens, hours and memory, and that it leaves nothing behind."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from evo_hpo.cli.commands import app
from evo_hpo.cli.dry_run import dry_run
from evo_hpo.errors import PlanError, TextError
from evo_hpo.scoring.footprint import ModelShape, configuration, footprint
from evo_hpo.scoring.forecast import forecast, scoring_rate
from evo_hpo.scoring.task import LanguageModelTask
from tests.scoring.test_task import model_folder, plan_of, settings

__all__ = ["model_folder"]

PLAN = """
name = "asked"
seeds = 3
[budget]
{budget}
[[problems]]
name = "{problem}"
[[searchers]]
name = "evopress"
"""


def told(plan: Any) -> str:
    """What a dry run of the plan prints."""
    output = io.StringIO()
    dry_run(plan, Console(file=output, width=150))
    return output.getvalue()


def test_hours_are_all_searches_tokens_over_the_rate(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evo_hpo.scoring.forecast.scoring_rate", lambda *_: 4.0)
    store = model_folder.parent / "never built"
    plan = plan_of(settings(model_folder, store), seeds=[0, 1])  # uniform has one seed: three searches
    row = next(line for line in told(plan).splitlines() if line.startswith("│ tiny"))
    assert [cell.strip() for cell in row.split("│")[2:7]] == ["3", "2,048", "6,144", "4", f"{6144 / 4 / 3600:.2g}"]
    assert not store.exists()


def test_problems_without_a_model_have_hours_where_the_budget_is_time(tmp_path: Path) -> None:
    path, root = tmp_path / "plan.toml", tmp_path / "runs"
    for problem, budget, hours in (("additive", "seconds = 1800", "2"), ("noisy", "tokens = 40960", "–")):
        path.write_text(PLAN.format(problem=problem, budget=budget), encoding="utf-8")
        found = CliRunner().invoke(
            app, ["compare", str(path), "--dry-run", "--root", str(root)], env={"COLUMNS": "150"}
        )
        row = next(line for line in found.output.splitlines() if line.startswith(f"│ {problem}"))
        assert [cell.strip() for cell in row.split("│")[6:8]] == [hours, "–"]  # with uniform, four searches
    assert not root.exists()


def test_what_a_run_would_refuse_is_refused(model_folder: Path) -> None:
    with pytest.raises(PlanError, match="a budget of 16 tokens does not pay for one trial of 64"):
        told(plan_of(settings(model_folder, model_folder), budget={"tokens": 16}))


@pytest.mark.parametrize("held_out", ["nowhere.txt", {"docs": "pydoc", "prose": "nowhere.txt"}])
def test_texts_that_are_missing_are_found(model_folder: Path, tmp_path: Path, held_out: Any) -> None:
    with pytest.raises(TextError, match="nowhere"):
        told(plan_of(settings(model_folder, tmp_path / "store", held_out=held_out)))
    assert not (tmp_path / "store").exists()


def test_an_ablation_has_one_too(tmp_path: Path) -> None:
    path, root = tmp_path / "plan.toml", tmp_path / "runs"
    path.write_text(PLAN.format(problem="additive", budget="seconds = 1200"), encoding="utf-8")
    asked = ["ablate", str(path), "--vary", "offspring=2,8", "--dry-run", "--root", str(root)]
    found = CliRunner().invoke(app, asked, env={"COLUMNS": "150"})
    row = next(line for line in found.output.splitlines() if line.startswith("│ additive"))
    assert [cell.strip() for cell in row.split("│")[2:7:4]] == ["10", "3.3"]  # three variants of three seeds, uniform
    assert not root.exists()


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_more_blocks_are_read_more_slowly(dtype: str) -> None:
    config = configuration("1B")
    config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim = 64, 256, 9000, 16
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    rates = []
    for config.num_hidden_layers in (2, 200):
        rates.append(scoring_rate(config, dtype, length=32))
        assert (config.num_hidden_layers, config.vocab_size) in ((2, 9000), (200, 9000))  # as it was given
    assert rates[0] > 3 * rates[1] > 0


def test_memory_is_that_of_the_tasks_settings(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evo_hpo.scoring.forecast.scoring_rate", lambda *_: 1.0)
    monkeypatch.setattr("evo_hpo.scoring.forecast.cores", lambda: 2)
    for memory in ("resident", "packed"):
        task = LanguageModelTask(**settings(model_folder, model_folder, memory=memory))
        expected = footprint(
            ModelShape.of(configuration(str(model_folder))),
            [2, 3, 4],
            memory=memory,
            group_size=16,
            number=4,
            sequence_length=16,
            calibration_tokens=512,
            held_out_tokens=128,
            replicas=2,
            on_cpu=True,
        )
        assert forecast(task).memory == expected.total
        mixed = forecast(LanguageModelTask(**settings(model_folder, model_folder, memory=memory, dtype="mixed"))).memory
        half = forecast(
            LanguageModelTask(**settings(model_folder, model_folder, memory=memory, dtype="bfloat16"))
        ).memory
        assert half is not None
        assert mixed is not None
        assert half < mixed < expected.total  # states and what a pass holds are as wide as in float32
    assert forecast(LanguageModelTask(**settings(model_folder, model_folder, join=["elsewhere"]))).memory is None


def test_labels_that_look_like_markup_are_shown_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    text = PLAN.format(problem="additive", budget="seconds = 60")
    path.write_text(text.replace('name = "additive"', 'name = "additive"\nlabel = "p [/x] q"'), encoding="utf-8")
    found = CliRunner().invoke(app, ["compare", str(path), "--dry-run"], env={"COLUMNS": "150"})
    assert found.exit_code == 0
    assert "│ p [/x] q │" in " ".join(found.output.split())


def test_memory_follows_what_the_build_is_told(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evo_hpo.scoring.forecast.scoring_rate", lambda *_: 1.0)

    def memory(kind: str, **build: Any) -> int:
        task = LanguageModelTask(**settings(model_folder, model_folder, memory=kind, build=build))
        found = forecast(task).memory
        assert found is not None
        return found

    config = configuration(str(model_folder))
    linear = ModelShape.of(config).linear
    assert memory("packed") == memory("packed", group_size=64)  # as it is built
    for smaller, larger in ((16, 64), (64, 128)):  # a scale and a zero point in 3 bytes, at three levels
        more = memory("packed", group_size=smaller) - memory("packed", group_size=larger)
        assert abs(more - 3 * 3 * (linear / smaller - linear / larger)) < 4
    assert memory("packed", group_size=0) == memory("packed", group_size=config.hidden_size)
    outer = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    assert memory("resident", embedding=True) - memory("resident") >= 3 * outer * 4  # decoded, in float32
