"""Held-out texts of several kinds, and what a backward pass told, as a reader of the report meets them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from evo_hpo import Budget, CompressionSpace, Minibatch, Unit
from evo_hpo.record.comparison import Comparison
from evo_hpo.report import Findings, write_report
from evo_hpo.report.curves import curve
from evo_hpo.report.plots import anytime_figure, cost_figure
from evo_hpo.report.sensitivity_map import level_shown, sensitivity_figure
from evo_hpo.report.style import save
from evo_hpo.report.summary import summarise
from evo_hpo.report.tables import rows
from evo_hpo.report.texts import elsewhere, text_columns
from evo_hpo.search.sensitivities import Form, Kind, Sensitivities
from evo_hpo.space.compression_space import Assignment
from tests.report.synthetic import StandIn, model_space, write_folder
from tests.report.test_report import page, printed


class TwoTexts(StandIn):
    """Its loss on a second text is that of other units; what a pass tells is the loss of one unit alone."""

    texts = ("docs", "prose")
    has_sensitivities = True

    def __init__(self, space: CompressionSpace) -> None:
        super().__init__(space)
        self.other = StandIn(space)
        self.other.weights = np.roll(self.weights, 5)

    def validate(self, assignment: Assignment) -> dict[str, float]:
        """On both texts."""
        own, other = super().validate(assignment), self.other.validate(assignment)
        gap = {"prose/gap": other["loss"] - own["loss"]}
        return own | {f"prose/{k}": v for k, v in other.items()} | gap

    def reference(self) -> dict[str, float]:
        """The dense model on both."""
        return super().reference() | {f"prose/{k}": v for k, v in self.other.reference().items()} | {"prose/gap": 0.0}

    def sensitivities(
        self, assignment: Assignment | None, minibatch: Minibatch, *, kind: Kind = "sampled", form: Form = "inner"
    ) -> Sensitivities:
        """Exact but for noise between sequences."""
        exact = self.weights[:, None] * 4.0 ** -np.arange(3) / self.weights.sum()
        signs = np.random.default_rng(minibatch.seed).normal(1, 0.3, (8, *exact.shape))
        projections = (signs * np.sqrt(2 * 7 * exact)).astype(np.float32)
        return Sensitivities(kind, assignment, projections, 7, 3 * minibatch.tokens)


EVOPRESS = {"offspring": 6, "survivors": (2, 1), "tokens": (16, 64)}
SEARCHERS: Sequence[tuple[str, str, dict[str, Any]]] = [
    ("uniform", "uniform", {}),
    ("random", "random", {}),
    ("evopress", "evopress", EVOPRESS),
    ("fisher", "fisher", {}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four searchers, two seeds, two held-out texts."""
    problem = TwoTexts(model_space(4))
    found = write_folder(tmp_path_factory.mktemp("texts"), [problem], SEARCHERS, (0, 1), Budget(tokens=64 * 40))
    record = json.loads((found / "comparison.json").read_text())
    record["problems"]["stand-in"]["texts"] = list(problem.texts)
    (found / "comparison.json").write_text(json.dumps(record))
    return found


def test_the_table_has_each_text_with_its_gain_and_the_gap_by_hand(folder: Path) -> None:
    results, problem = Findings.load(folder), TwoTexts(model_space(4))
    levels = {label: [r.final.levels for r in results.of("stand-in", label) if r.final] for label in results.labels}
    uniform = problem.other.exact(problem.space.uniform())
    shown = {c.key: dict(zip(results_order(folder), c.cells, strict=True)) for c in text_columns(results, "stand-in")}
    for label, found in levels.items():
        docs, prose = ([of.exact(a) for a in found] for of in (problem, problem.other))
        gaps = [b - a for a, b in zip(docs, prose, strict=True)]
        assert shown["prose/loss"][label].startswith(f"{np.median(prose):.4f}")
        assert float(shown["prose/text_gap"][label].split(" [")[0]) == pytest.approx(np.median(gaps), rel=2e-2)
        if label != "uniform":
            assert shown["prose/gain"][label].startswith(
                f"{np.median([100 * (1 - x / uniform) for x in prose]):+.1f} %"
            )
            assert shown["prose/wins"][label] == f"{sum(x < uniform for x in prose)}/2"
    assert shown["prose/loss"]["dense"] == "0"
    assert not text_columns(results.on("stand-in", "prose"), "stand-in")


def results_order(folder: Path) -> list[str]:
    """Searchers in the order of the table."""
    return [r.searcher for r in rows(Findings.load(folder), "stand-in")]


def test_tables_curves_and_statistics_of_a_text_are_those_of_a_comparison_on_it_alone(
    folder: Path, tmp_path: Path
) -> None:
    """The second text's figures are put where the first's stand, in a copy of every journal."""
    (tmp_path / "journals").mkdir()
    (tmp_path / "comparison.json").write_text(
        (folder / "comparison.json").read_text().replace('["docs", "prose"]', "[]")
    )
    for journal in (folder / "journals").iterdir():
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        for line in lines:
            if line["kind"] == "checkpoint":
                line["held_out"] = {k: line["held_out"][f"prose/{k}"] for k in ("loss", "perplexity")}
        (tmp_path / "journals" / journal.name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    on, alone = Findings.load(folder).on("stand-in", "prose"), Findings.load(tmp_path)
    pd.testing.assert_frame_equal(summarise(on).frame(), summarise(alone).frame())
    assert {r.searcher: r.loss for r in rows(on, "stand-in")} == {r.searcher: r.loss for r in rows(alone, "stand-in")}
    for a, b in zip(on.runs, alone.runs, strict=True):
        assert curve(a, "tokens").loss.tolist() == curve(b, "tokens").loss.tolist()


def test_the_verdict_says_what_is_left_on_the_other_text(folder: Path) -> None:
    results = Findings.load(folder)
    summary = summarise(results)
    best = {r.searcher: r for r in rows(results.on("stand-in", "prose"), "stand-in")}[summary.best]
    said = elsewhere(results, "stand-in", summary.best)
    assert summary.verdict.endswith(said)
    assert said.startswith(f"On prose {summary.best} is at {best.loss.estimate:.4g}, {abs(best.gain.estimate):.1f} % ")
    assert said.endswith(" above docs.")
    assert "the least median KL on docs (nats/token)" in summary.verdict
    assert "prose" not in summarise(results.on("stand-in", "docs")).verdict


@pytest.fixture(scope="module")
def written(folder: Path) -> Path:
    """The page of the comparison."""
    return write_report(folder)


def test_page_pictures_and_files_show_each_text(folder: Path, written: Path) -> None:
    path = written
    text = path.read_text(encoding="utf-8")
    page(path)
    for said in ("KL on docs (nats/token)", "KL on prose (nats/token)", "On prose: how sure is that?", "above docs"):
        assert said in text
    for name in ("texts", "sensitivities", "anytime"):
        assert (path.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(anytime_figure(Findings.load(folder), "stand-in").axes) == 2
    table, statistics = (pd.read_csv(path.parent / f"{name}.csv") for name in ("table", "statistics"))
    assert table["text"].value_counts().to_dict() == {"docs": 5, "prose": 5}
    assert statistics["text"].value_counts().to_dict() == {"docs": 4, "prose": 4}
    assert "prose/gap" in pd.read_csv(path.parent / "checkpoints.csv").columns


def test_the_picture_of_cost_has_every_token_gradients_included(folder: Path) -> None:
    results = Findings.load(folder)
    left = cost_figure(results, "stand-in").axes[0]
    bars = dict.fromkeys((text.get_text() for text in left.get_yticklabels()), 0.0)
    for part in left.containers:
        for label, bar in zip(bars, part, strict=True):
            bars[label] += bar.get_width()
    runs = {label: results.of("stand-in", label) for label in bars}
    assert bars == {label: pytest.approx(np.mean([r.tokens for r in found])) for label, found in runs.items()}
    legend = left.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["gradients", "stage 0", "stage 1"]
    gradients = dict(zip(bars, (bar.get_width() for bar in left.containers[0]), strict=True))
    assert gradients["fisher"] > 0
    assert sum(gradients.values()) == gradients["fisher"]


@pytest.mark.parametrize("width", [60, 80, 100, 150, 250])
def test_the_tables_of_every_text_fit_the_terminal(folder: Path, width: int) -> None:
    text = printed(folder, width)
    assert "above" in text
    assert "KL on prose" in text
    if width >= 80:
        assert "…" not in text


# ---------------------------------------------------------------------- what a pass told


def test_each_search_that_measured_has_a_picture_for_its_run(written: Path) -> None:
    recorded = Comparison.read(written.parent.parent)
    drawn = {s.searcher for s in recorded.searches if recorded.sensitivities_picture(s.id).is_file()}
    assert drawn == {"fisher"}


def some(space: CompressionSpace, kind: Kind = "sampled", reference: Assignment | None = None) -> Sensitivities:
    """Sensitivities of three levels, zero at the reference's own."""
    found = np.random.default_rng(0).normal(size=(4, len(space.units), max(len(u.levels) for u in space.units)))
    if reference is not None:
        found[:, np.arange(len(reference)), list(reference)] = 0
    return Sensitivities(kind, reference, found.astype(np.float32), 5, 60)


def test_the_level_that_is_drawn_is_uniforms_or_the_cheapest() -> None:
    space = model_space(2)
    assert level_shown(space, some(space)) == (list(space.uniform()), "level 3 (uniform's)")
    assert level_shown(space, some(space, "kl", space.uniform())) == ([0] * 14, "level 2 (the cheapest)")
    dropping = CompressionSpace([Unit(f"layers.{i}.mlp", (0, 1), levels=("dropped", "kept")) for i in range(4)], 2)
    assert level_shown(dropping, some(dropping)) == ([0] * 4, "level dropped (the cheapest)")


def test_the_sums_beside_the_map_are_those_of_roles_and_blocks() -> None:
    space = model_space(3)
    found = some(space)
    effects = np.square(found.projections[:, :, 1].astype(float)).mean(axis=0) / 2 / 5
    top, _, _, right = sensitivity_figure(space, found).axes[:4]
    blocks = [sum(e for u, e in zip(space.units, effects, strict=True) if u.block == b) for b in range(3)]
    assert [bar.get_height() for bar in top.patches] == pytest.approx(blocks)  # type: ignore[attr-defined]
    roles = dict.fromkeys(u.role for u in space.units)
    sums = [sum(e for u, e in zip(space.units, effects, strict=True) if u.role == role) for role in roles]
    assert [bar.get_width() for bar in right.patches] == pytest.approx(sums)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("space", "kind"),
    [
        (model_space(2), "kl"),
        (CompressionSpace([Unit(f"u{i}", (0, 1), levels=("dropped", "kept")) for i in range(70)], 40), "sampled"),
        (CompressionSpace([Unit("only", (0, 1))], 1), "true"),
    ],
    ids=["signed", "no-blocks", "one-unit"],
)
def test_sensitivities_of_any_space_can_be_drawn(space: CompressionSpace, kind: Kind, tmp_path: Path) -> None:
    reference = space.uniform() if kind == "kl" else None
    assert len(save(sensitivity_figure(space, some(space, kind, reference)), tmp_path / "s")) == 2
