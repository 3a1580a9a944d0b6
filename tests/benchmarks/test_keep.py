"""Keeping a report: what a reader of the repository finds in its folder."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest

from benchmarks.measurements.keep import main
from evo_hpo.report import Findings
from tests.report.conftest import suite

__all__ = ["suite"]


@pytest.mark.usefixtures("sketched")
def test_a_kept_report_says_what_the_statistics_say(suite: Path, tmp_path: Path) -> None:
    note = tmp_path / "note.md"
    note.write_text("- A remark.\n", encoding="utf-8")
    target = tmp_path / "kept"
    main([str(suite), str(target), "--command", "evo-hpo compare plan.toml", "--note", str(note), "--journals"])
    page = (target / "README.md").read_text(encoding="utf-8")
    comparison = Findings.load(suite)
    assert f"**{comparison.summary().verdict}**" in page
    assert all(comparison.summary(key).verdict in page for key in comparison.problems)
    assert all(label in page for label in comparison.labels)
    assert "evo-hpo compare plan.toml" in page
    assert "- A remark." in page
    assert "known optimum" in page
    assert {"report.html", "table.csv", "ranks.png"} <= {p.name for p in target.iterdir()}
    shown = re.findall(r'<img src="([^"]*)"', (target / "report.html").read_text(encoding="utf-8"))
    assert set(shown) == {p.name for p in target.glob("*.png")}  # each picture is kept once
    with tarfile.open(target / "journals.tar.xz") as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    for journal in (suite / "journals").glob("*.jsonl"):
        assert (tmp_path / "unpacked" / "journals" / journal.name).read_bytes() == journal.read_bytes()
    assert not any(str(suite) in text for text in (page, (target / "report.html").read_text(encoding="utf-8")))
