"""Names of problems, searchers, texts and units as people give them: in files, pictures and on the terminal."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from evo_hpo import Budget, CompressionSpace, FunctionProblem, Unit
from evo_hpo.record.comparison import Comparison, distinct
from evo_hpo.report import Findings, final_table, write_report
from evo_hpo.report.heat_maps import profile_figure, profiles_figure
from evo_hpo.report.lineage import lineage_figure
from evo_hpo.report.plots import anytime_figure, cost_figure, ecdf_figure
from evo_hpo.report.rank_plots import rank_figure, wins_figure
from evo_hpo.report.size_plot import size_figure
from evo_hpo.report.style import literal
from evo_hpo.report.texts import gains_figure
from evo_hpo.search.checkpoint import Checkpoint
from tests.report.synthetic import of_runs, one_run, write_folder

NAMES = ["_mine", "_x $1 to $2", r"cost $\foo$", "50% $a_{$", "$"]


def test_names_that_differ_keep_their_own_and_others_get_a_number() -> None:
    assert distinct({"a b": "a-b", "c": "c", "a-b": "a-b", "a/b": "a-b", "a-b-2": "a-b-2"}) == {
        "a b": "a-b",
        "c": "c",
        "a-b": "a-b-3",
        "a/b": "a-b-4",
        "a-b-2": "a-b-2",
    }


def test_problems_whose_names_differ_in_punctuation_alone_have_their_own_pictures_and_winners(tmp_path: Path) -> None:
    """Names as before where they are alone: "add itive" and "модель А" keep theirs."""
    space = CompressionSpace([Unit(f"u{i}", (0, 1)) for i in range(3)], 2)
    keys = ["модель А", "модель Б", "add itive", "x/y", "x-y"]
    problems = [
        FunctionProblem(space, lambda a, i=i: float(i + a[i % 3]), key)  # type: ignore[misc]
        for i, key in enumerate(keys)
    ]
    write_folder(tmp_path, problems, [("uniform", "uniform", {}), ("random", "random", {})], [0], Budget(evaluations=4))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    names = {path.name for path in (tmp_path / "report").glob("anytime-[!s]*.png")} | {
        path.name for path in (tmp_path / "report").glob("anytime--*.png")
    }
    assert names == {
        "anytime--.png",
        "anytime---2.png",
        "anytime-add-itive.png",
        "anytime-x-y.png",
        "anytime-x-y-2.png",
    }
    anchors = re.findall(r'<section id="(p-[^"]*)"', page)
    assert len(set(anchors)) == len(anchors) == 5
    pictures = [re.findall(r'src="(data:[^"]+)"', part)[0] for part in page.split('<section id="p-')[1:]]
    assert len(set(pictures)) == 5
    recorded = Comparison.read(tmp_path)
    recorded.write_profiles()
    assert {path.name for path in recorded.winner_files()} == {
        f"winner-{name}.json" for name in ("модель А", "модель Б", "add itive", "x-y", "x-y-2")
    }
    assert len(recorded.winning_profiles()) == 5


def shown(figure: Figure) -> set[str]:
    """All that a picture says, as it is drawn; drawing it must not fail."""
    figure.savefig(io.BytesIO())
    from matplotlib.text import Text

    said = [text._preprocess_math(text.get_text()) for text in figure.findobj(Text)]  # type: ignore[attr-defined]
    return {line.removeprefix("\u200b") for text, formula in said if not formula for line in text.splitlines()}


@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_every_name_as_it_is(name: str) -> None:
    """In legends, titles and axes, of searchers, problems, texts, units, levels and files."""
    runs = [one_run(name, "uniform", 0, [1.0], fixed=True)]
    runs += [one_run(name, label, s, [0.9, 0.5 + 0.1 * s]) for label in (name, "other") for s in range(2)]
    space = CompressionSpace([Unit(f"layers.{i}.{name}", (0, 1), levels=("a", name)) for i in range(4)], 2)
    found = of_runs(runs, texts=(name, "b"))
    figures = {"b/loss": 0.5, "b/gap": 0.1}
    runs = [replace(r, checkpoints=tuple(with_figures(c, figures) for c in r.checkpoints)) for r in found.runs]
    found = replace(found, runs=tuple(runs), problems={name: replace(found.problems[name], space=space)})
    summary = found.on(name, name).summary()
    for figure, what in (
        (anytime_figure(found, name), f"{name}  0.5500"),
        (ecdf_figure(found, name), None),
        (cost_figure(found, name), name),
        (rank_figure(summary), None),
        (wins_figure(found, summary), name),
        (gains_figure(found, name), name),
        (lineage_figure(found.runs[1], space), f"{name}, seed 0: 0 accepted steps"),
        (profile_figure(space, (0, 0, 1, 1), name), name),
        (profiles_figure(found, name, [name, "other"]), f"{name}, seed 0: 0.5"),
        (size_figure([file_of(name)], [name]), name),
    ):
        said = shown(figure)
        assert what in said if what else any(name in text for text in said)
    legend = ecdf_figure(found, name).axes[0].get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 3


def with_figures(checkpoint: Checkpoint, more: dict[str, float]) -> Checkpoint:
    return replace(checkpoint, held_out=checkpoint.held_out | more)


def file_of(name: str) -> dict[str, object]:
    return {"name": name, "bytes": 1e6, "texts": {name: {"perplexity": {"mean": 2.0, "low": None, "high": None}}}}


def test_plain_names_are_left_alone() -> None:
    for name in ("evopress (offspring=4)", "a_b", "50 %", r"a\b", "модель"):
        assert literal(name) == name


def test_the_terminal_shows_names_that_look_like_markup() -> None:
    problem, label = "p [/x] q", "[bold]a"
    runs = [one_run(problem, "uniform", 0, [1.0], fixed=True), one_run(problem, label, 0, [0.5])]
    found = of_runs([*runs, *(replace(r, problem="other", id=f"o{r.id}") for r in runs)], texts=("[/x]", "b [red]"))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(final_table(Findings("n", found.problems, found.runs)))
    text = console.export_text()
    for said in (problem, label, "loss on [/x]"):
        assert said in text
