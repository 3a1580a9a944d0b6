"""In MLflow: the figures of every held-out text, and what a search measured as a picture on its own run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from benchmarks.problems.synthetic import noisy
from evo_hpo import Budget
from evo_hpo.record.comparison import Comparison, PlannedSearch
from evo_hpo.record.journal import Journal, read_journals
from evo_hpo.record.problem_record import ProblemRecord
from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.search.trial import Measured, Probe
from evo_hpo.tracking import log_comparison, log_evaluation, track
from evo_hpo.tracking.views import views
from tests.report.synthetic import write_folder
from tests.tracking.conftest import Runs, Script

PROSE = {"prose/loss": 1.25, "prose/perplexity": 40.0, "prose/gap": 0.75}


@pytest.fixture
def folder(root: Path) -> Path:
    """A comparison of two searches, of which one measured sensitivities that were drawn."""
    folder = root / "comparisons" / "texts"
    entries = []
    for seed in (0, 1):
        script = Script(folder / "journals" / f"a-s{seed}.jsonl", seed=seed)
        script.write([3.0, 2.0], checkpoint=True, more_held_out=PROSE, end=True)
        entries.append(
            PlannedSearch(f"a-s{seed}", "p", "script", "script", {}, seed, f"journals/a-s{seed}.jsonl", False)
        )
    record = {"plan": {"problems": [{"name": "p"}]}, "searches": [asdict(e) for e in entries]}
    record["problems"] = {"p": ProblemRecord("p", script.problem.space, texts=("docs", "prose")).to_json()}
    (folder / "comparison.json").write_text(json.dumps(record))
    picture = Comparison.read(folder).sensitivities_picture("a-s1")
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"picture")
    Comparison.read(folder).write_profiles()
    return folder


def test_searches_and_the_winner_have_the_figures_of_every_text(folder: Path, runs: Runs) -> None:
    track(folder)
    log_comparison(folder)
    wanted = {f"held_out/{name}": value for name, value in PROSE.items()} | {"held_out/loss": 0.5}
    found = [*runs("tags.kind = 'search'"), *runs("tags.kind = 'comparison'")]
    assert len(found) == 3
    for run in found:
        assert wanted.items() <= run.data.metrics.items()
    assert "held-out loss 0.5, on prose 1.25" in found[-1].data.tags["mlflow.note.content"]


def test_a_search_that_measured_has_its_picture_and_no_other_has(folder: Path, root: Path, runs: Runs) -> None:
    log_comparison(folder)  # before its searches are in the store: nothing to put it on
    assert not runs("tags.kind = 'search'")
    track(folder)
    log_comparison(folder)
    held = {
        run.data.tags["search"]: [p.name for p in (root / "artifacts" / "texts" / run.info.run_id).rglob("*.png")]
        for run in runs("tags.kind = 'search'")
    }
    assert held == {"a-s0": [], "a-s1": ["a-s1.png"]}


def test_a_final_evaluation_stands_beside_the_search_that_found_the_profile(
    folder: Path, root: Path, runs: Runs, tmp_path: Path
) -> None:
    track(folder)
    (tmp_path / "evaluation.json").write_text("{}")
    figure = {"perplexity": {"mean": 20.0, "low": 19.0, "high": None}, "kl": None}
    row = {"spec": "m", "bytes": 1000, "weights": 800, "texts": {"docs": figure}, "tasks": {"cats/acc": 0.5}}
    table = {"protocol": {"stride": 0}, "results": [{"name": "original", "search": "", **row}]}
    table["results"].append({"name": "winner", "search": "a-s0", **row})  # type: ignore[attr-defined]
    for _ in range(2):  # again is the same
        log_evaluation(folder, table, [tmp_path / "evaluation.json"])
    found = {run.data.tags["model"]: run.data.metrics for run in runs("tags.kind = 'evaluation'")}
    wanted = {"docs/perplexity": 20.0, "docs/perplexity_low": 19.0, "bytes": 1000.0, "bits_a_weight": 10.0}
    assert found == dict.fromkeys(["winner", "original"], wanted | {"tasks/cats/acc": 0.5})
    held = {
        run.data.tags["search"]: [p.name for p in (root / "artifacts" / "texts" / run.info.run_id).rglob("*.json")]
        for run in runs("tags.kind = 'search'")
    }
    assert "evaluation.json" in held["a-s0"]
    assert "evaluation.json" not in held["a-s1"]
    for stride in (512, 256):  # no figures under another protocol's parameters
        log_evaluation(folder, {**table, "protocol": {"stride": stride}}, [])
    strides = {(r.data.tags["model"], r.data.params["stride"]) for r in runs("tags.kind = 'evaluation'")}
    assert strides == {(model, stride) for model in ("original", "winner") for stride in ("512", "256")}


def test_saved_views_show_every_text(folder: Path) -> None:
    made = {view.id: view for view in views(read_journals(folder))}
    assert {f"metrics.`held_out/prose/{name}`" for name in ("loss", "gap")} <= set(made["searches"].columns)
    assert "held_out/prose/loss" in [card.get("metricKey") for card in made["curves"].charts]


def test_tokens_spent_count_what_sensitivities_were_charged(root: Path, runs: Runs) -> None:
    script = Script(root / "comparisons" / "probed" / "journals" / "a-s0.jsonl")
    found = Sensitivities("sampled", None, np.ones((2, 5, 3), dtype=np.float32), 7, 600)
    with Journal.open(script.path, script.header) as journal:
        journal.record_probe(Measured(Probe(None, "sampled", 200), found, 1.0, 7))
    script.write([3.0, 2.0], end=True)  # of 100 tokens each
    track(root / "comparisons" / "probed")
    (run,) = runs("tags.kind = 'search'")
    assert run.data.metrics["search/tokens"] == 600 + 200


@pytest.fixture
def ranged(root: Path) -> Path:
    """The folder of a comparison over a range of budgets, with its fronts as files."""
    folder = root / "comparisons" / "range"
    problem = noisy(units=14, tightness=0.2, tightest=0.9)
    searchers: list[tuple[str, str, dict[str, Any]]] = [("uniform", "uniform", {}), ("random", "random", {})]
    folder.mkdir(parents=True)
    write_folder(folder, [problem], searchers, (0,), Budget(tokens=1024 * 24))
    Comparison.read(folder).write_profiles()
    return folder


def test_the_front_is_a_curve_of_its_search_and_its_mean_a_figure_once(ranged: Path, uri: str, runs: Runs) -> None:
    for _ in range(2):  # nothing is there twice
        track(ranged)
        log_comparison(ranged)
    client = MlflowClient(tracking_uri=uri)
    for record in read_journals(ranged):
        (run,) = runs(f"tags.kind = 'search' and tags.search = '{record.search}'")
        points = client.get_metric_history(run.info.run_id, "front/loss")
        kept = json.loads((ranged / "fronts" / f"{record.search}.json").read_text())
        expected = [(round(1000 * p["average"]), p["held_out"]["loss"]) for p in kept["points"]]
        assert [(p.step, p.value) for p in points] == expected
        (mean,) = client.get_metric_history(run.info.run_id, "front/mean_loss")
        assert mean.value == kept["mean loss"]["loss"]
    made = {view.id: view for view in views(read_journals(ranged))}
    assert made["searches"].order == made["front"].order == "metrics.`front/mean_loss`"
    assert made["searches"].columns[0] == "metrics.`front/mean_loss`"
    (card,) = made["front"].charts
    assert (card["type"], card["metricKey"], card["xAxisKey"]) == ("LINE", "front/loss", "step")
    best = runs(made["front"].where, f"{made['front'].order} ASC")
    means = [run.data.metrics["front/mean_loss"] for run in best]
    assert means == sorted(means)
    note = client.get_experiment_by_name("range").tags["mlflow.note.content"]  # type: ignore[union-attr]
    assert f"{best[0].data.tags['search']}, mean held-out loss over the range {means[0]:.6g}" in note
    assert len(means) == 2


def test_the_front_of_a_search_that_is_not_done_is_no_curve_yet(ranged: Path, uri: str, runs: Runs) -> None:
    path = ranged / "journals" / "noisy-random-s0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if '"kind": "checkpoint"' in line or '"kind":"checkpoint"' in line)
    path.write_text("".join(lines[:last]))
    track(ranged)
    log_comparison(ranged)
    where = "tags.kind = 'search' and tags.search = 'noisy-random-s0'"
    (cut,) = runs(where)
    assert not any(key.startswith("front/") for key in cut.data.metrics)
    path.write_text("".join(lines))  # as a resumed search ends
    track(ranged)
    log_comparison(ranged)
    (whole,) = runs(where)
    assert {"front/loss", "front/mean_loss"} <= set(whole.data.metrics)
    client = MlflowClient(tracking_uri=uri)
    steps = [p.step for p in client.get_metric_history(whole.info.run_id, "front/loss")]
    assert len(steps) == len(set(steps)) > 3


def test_over_a_range_every_trial_has_its_cost_and_the_front_is_an_artifact(
    ranged: Path, root: Path, runs: Runs
) -> None:
    folder = ranged
    space = Comparison.read(folder).problems["noisy"].space
    track(folder)
    own = log_comparison(folder)
    trials = runs("tags.kind = 'trial' and tags.search = 'noisy-random-s0'")
    record = next(r for r in read_journals(folder) if r.searcher == "random")
    costs = {str(o.trial.number): space.cost(o.trial.levels) for o in record.outcomes}
    assert {t.data.tags["trial"]: t.data.metrics["cost"] for t in trials} == costs
    kept = root / "artifacts" / "range" / own / "artifacts" / "fronts"
    assert {path.name for path in kept.iterdir()} == {path.name for path in (folder / "fronts").iterdir()}
    (search,) = runs("tags.kind = 'search' and tags.search = 'noisy-random-s0'")
    attached = root / "artifacts" / "range" / search.info.run_id / "artifacts" / "fronts"
    assert {path.name for path in attached.iterdir()} == {"noisy-random-s0.csv", "noisy-random-s0.json"}
    assert "winner" not in {view.id for view in views(read_journals(folder))}
