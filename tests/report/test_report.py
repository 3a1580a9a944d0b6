"""What a reader gets: tables for the terminal, pictures, one page that needs nothing else."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from rich.console import Console

from evo_hpo import Budget, CompressionSpace, FunctionProblem, Unit
from evo_hpo.report import Findings, final_table, write_report
from evo_hpo.report.final_table import LAST
from evo_hpo.report.heat_maps import layout_of, profile_figure
from evo_hpo.report.results import Results
from evo_hpo.report.style import save
from evo_hpo.report.summary import summarise
from evo_hpo.report.tables import columns, figure_text, rows
from tests.report.synthetic import model_space, write_folder
from tests.report.test_comparison import partial


class Page(HTMLParser):
    """Collects sources and checks that tags are closed in order."""

    EMPTY = frozenset({"meta", "img", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)
        found = dict(attrs)
        self.sources += [v for k, v in found.items() if k in ("src", "href") and v]
        if tag == "img":
            self.images += 1
            assert found.get("alt")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(path: Path) -> Page:
    parsed = Page()
    parsed.feed(path.read_text(encoding="utf-8"))
    assert not parsed.open
    return parsed


@pytest.fixture(scope="module")
def written(demo: Path) -> Path:
    """The page of the small comparison."""
    return write_report(demo)


def test_the_page_is_whole_and_loads_nothing(demo: Path, written: Path) -> None:
    path = written
    parsed = page(path)
    assert all(s.startswith(("data:image/png;base64,", "#")) for s in parsed.sources)
    assert parsed.images >= 8
    text = path.read_text(encoding="utf-8")
    assert "too few for a claim" in text
    assert f"name = &#34;{demo.name}&#34;" in text
    assert not re.search(r"<script|https?://", text)


def test_pictures_and_tables_lie_beside_the_page(written: Path) -> None:
    folder = written.parent
    for name in ("anytime", "anytime-seconds", "profile", "profiles", "ranks", "wins", "ecdf", "cost", "lineage"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")
    csv, parquet = pd.read_csv(folder / "table.csv"), pd.read_parquet(folder / "table.parquet")
    assert list(csv["searcher"]) == list(parquet["searcher"])
    assert csv["loss"].to_list() == pytest.approx(parquet["loss"].to_list())
    assert len(pd.read_csv(folder / "statistics.csv")) == 3


def test_the_same_journals_give_the_same_report(demo: Path, written: Path) -> None:
    first = written.read_bytes()
    assert write_report(demo).read_bytes() == first


def test_several_problems_have_a_common_section(suite: Path) -> None:
    path = write_report(suite)
    page(path)
    text = path.read_text(encoding="utf-8")
    assert "All problems together" in text
    assert "known optimum" in text
    assert (path.parent / "anytime-additive.png").exists()


def test_a_half_done_comparison_is_reported(demo: Path, tmp_path: Path) -> None:
    folder = partial(demo, tmp_path / "part")
    text = write_report(folder).read_text(encoding="utf-8")
    assert "So far (2 of 5 searches finished)" in text
    assert "not started" in text


def test_a_comparison_without_any_journal_is_reported(demo: Path, tmp_path: Path) -> None:
    shutil.copy(demo / "comparison.json", tmp_path / "comparison.json")
    assert "No search has a result yet" in write_report(tmp_path).read_text(encoding="utf-8")
    console = Console(width=100, record=True, quiet=True)
    console.print(final_table(Findings.load(tmp_path)))


def test_a_single_search_is_reported(tmp_path: Path) -> None:
    problem = FunctionProblem(CompressionSpace([Unit(f"u{i}", (0, 1)) for i in range(3)], 2), lambda a: float(sum(a)))
    write_folder(tmp_path, [problem], [("random", "random", {})], [0], Budget(evaluations=8))
    assert "Nothing to compare it with" in write_report(tmp_path).read_text(encoding="utf-8")


def printed(folder: Path, width: int) -> str:
    """The final table in a terminal of this width, in which it must fit."""
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console:
        console.print(final_table(Findings.load(folder)))
    console.file.close()
    lines = console.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    return "\n".join(lines)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_table_fits_its_terminal(demo: Path, width: int) -> None:
    text = printed(demo, width)
    for name in ("dense", "uniform", "random", "evopress"):
        assert name in text
    if width < 80:
        return
    assert "…" not in text
    for name in ("perplexity", "tokens", "trials", "model", "seeds"):
        assert name in text


def test_narrow_headers_break_the_wide_ones_where_they_may_be_broken(demo: Path, suite: Path) -> None:
    for folder in (demo, suite):
        results = Results.load(folder)
        for key in results.problems:
            found = columns(results, key, rows(results, key))
            assert [c.short.replace("\n", " ") for c in found] == [c.title for c in found]
            priorities = [c.priority for c in found if c.priority]
            assert len(set(priorities)) == len(priorities)
            assert max(priorities) <= LAST
            assert {c.key for c in found if not c.priority} >= {"searcher", "loss", "average", "seeds"}
    assert [c.short for c in columns(results, key, rows(results, key))][-3:] == ["model\ns", "searcher\ns", "seeds"]


def test_a_notebook_has_figures_and_statistics_a_method_away(demo: Path) -> None:
    comparison = Findings.load(demo)
    assert comparison.anytime().axes
    assert comparison.profile(label="evopress").axes
    assert comparison.summary().verdict == summarise(Results.load(demo)).verdict
    assert comparison.summary("stand-in").problems == ("stand-in",)


def test_figures_are_rounded_to_four_digits() -> None:
    shown = [figure_text(v) for v in (0.0, 0.81934, 55.84, 91467.2, 1.2e-7, float("inf"), float("nan"))]
    assert shown == ["0", "0.8193", "55.84", "91,467", "1.200e-07", "failed", "–"]


def test_grid_averages_are_weighted_by_size() -> None:
    space = model_space(2)
    levels = tuple(0 if u.role == "self_attn.q_proj" else 1 for u in space.units)
    grid = layout_of(space, levels)
    assert grid.row_names[0] == "q_proj"
    assert grid.column_names == ["0", "1"]
    assert grid.row_means[0] == 2.0
    assert grid.mean == pytest.approx(space.average(levels))
    assert grid.column_means.tolist() == pytest.approx([space.average(levels)] * 2)


@pytest.mark.parametrize(
    "units",
    [
        [Unit(f"u{i}", (0, 1), levels=("dropped", "kept")) for i in range(70)],
        [Unit(f"model.layers.{i}.mlp", (30, 50, 70), levels=("0.7", "0.5", "0.3")) for i in range(80)],
        [Unit("only", (0, 1))],
        [Unit(f"layers.{i // 4}.mlp.experts.{i % 4}.up_proj", (2, 3, 4), levels=("2", "3", "4")) for i in range(16)],
        [Unit(f"layers.{i}", tuple(range(17))) for i in range(5)],
    ],
    ids=["no-blocks", "sparsity", "one-unit", "experts", "many-levels"],
)
def test_profiles_of_any_space_can_be_drawn(units: list[Unit], tmp_path: Path) -> None:
    space = CompressionSpace(units, 100_000)
    drawn = profile_figure(space, space.highest, "a title")
    assert len(save(drawn, tmp_path / "p")) == 2
