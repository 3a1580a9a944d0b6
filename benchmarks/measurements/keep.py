"""Keeps a comparison's report: `python -m benchmarks.measurements.keep FOLDER docs/results/NAME --command "..."`.

Copies the page, the pictures (PNG), the tables (CSV) and the plan, and writes a README.md with the command, the machine
and what the statistics say, in the report's own words. The kept page shows the pictures beside it. `--journals` keeps
what every search asked and was told too (about 25 kB a search): unpacked into a comparison of the same plan, `--resume`
goes on from it, on a machine that builds the same level store.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evo_hpo.report.findings import Findings
from evo_hpo.report.page import medians_sheet
from evo_hpo.report.report import write_report
from evo_hpo.report.summary import Standing, Summary, summarise
from evo_hpo.report.tables import columns, figure_text, interval_note, interval_text, rows
from evo_hpo.report.texts import text_columns


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the report anew and keeps it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the comparison")
    parser.add_argument("target", type=Path)
    parser.add_argument("--command", required=True, help="the command that made it, for the page")
    parser.add_argument("--note", type=Path, metavar="FILE", help="Markdown to put between the verdict and the tables")
    parser.add_argument("--journals", action="store_true", help="keep them too, as journals.tar.xz")
    options = parser.parse_args(arguments)
    write_report(options.folder)
    if options.journals:
        options.target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(options.target / "journals.tar.xz", "w:xz") as packed:
            packed.add(options.folder / "journals", "journals")
    keep(options.folder, options.target, options.command, options.note.read_text("utf-8") if options.note else "")


def keep(folder: Path, target: Path, command: str, note: str = "") -> None:
    """Copies a written report and adds its README."""
    target.mkdir(parents=True, exist_ok=True)
    report = folder / "report"
    found = sorted([*report.glob("*.png"), *report.glob("*.csv"), folder / "plan.toml"])
    page = report / "report.html"
    for path in found:
        shutil.copy(path, target / path.name)
    text = page.read_text(encoding="utf-8").replace(str(folder), f"mlruns/comparisons/{folder.name}")
    for picture in report.glob("*.png"):
        held = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        text = text.replace(held, picture.name)
    (target / page.name).write_text(text, encoding="utf-8")
    comparison = Findings.load(folder)
    lines = [*_head(comparison, command), *([note.strip(), ""] if note else []), *_tables(comparison)]
    (target / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _gpus(names: Sequence[str], plan: Mapping[str, Any]) -> str:
    """Those of the machine, where a problem of the plan may have used one."""
    settings = [problem.get("settings") or {} for problem in plan.get("problems") or ()]
    used = any(own.get("devices") or own.get("device", "cpu") != "cpu" for own in settings)
    return "".join(f"{count} x {name}, " for name, count in Counter(names).items()) if used else ""


def _head(comparison: Findings, command: str) -> Iterator[str]:
    keys = list(comparison.problems)
    summary = summarise(comparison, keys)
    recorded, machine, versions = comparison.recorded, comparison.recorded.machine, comparison.recorded.versions
    cores, gpus = machine.get("cores"), _gpus(machine.get("gpus") or (), recorded.plan)
    yield from (f"# {comparison.name}", "", str(recorded.plan.get("description") or ""), "")
    yield from ("```console", command, "```", "")
    yield (
        f"{recorded.started}, on {gpus}{cores} core{'' if cores == 1 else 's'} of {machine.get('processor')}; Python"
        f" {versions.get('python')}, numpy {versions.get('numpy')}, torch {versions.get('torch', 'not installed')},"
        f" Optuna {versions.get('optuna')}, Nevergrad {versions.get('nevergrad')}."
    )
    yield from ("", f"**{summary.verdict}**", "")
    if len(keys) > 1:
        for key in keys:
            yield f"- {key}: {summarise(comparison, [key]).verdict}"
            yield from (f"  {line}." for line in comparison.problems[key].notes)
        yield ""
    yield from ("[report.html](report.html) has everything; the tables are CSV files beside it.", "")


def _tables(comparison: Findings) -> Iterator[str]:
    keys = list(comparison.problems)
    if len(keys) == 1:
        found = rows(comparison, keys[0])
        shown = columns(comparison, keys[0], found)
        yield from _table([c.title for c in shown], list(zip(*(c.cells for c in shown), strict=True)))
        yield from ("", interval_note(found), "")
        if texts := text_columns(comparison, keys[0]):
            yield from _table([c.title for c in texts], list(zip(*(c.cells for c in texts), strict=True)))
            yield from ("", "![Gain over uniform on each held-out text](texts.png)", "")
        yield "![Held-out loss of the incumbent](anytime.png)"
        return
    summary = summarise(comparison, keys)
    header = ["searcher", "mean rank", f"median {summary.value}", "best's wins / ties / losses", "p (Holm)"]
    yield from _table(header, [_standing(s) for s in summary.standings])
    yield from ("", "Median loss on each problem, the least of a column marked *:", "")
    summaries: dict[str, Summary] = {key: summarise(comparison, [key]) for key in keys}
    sheet = medians_sheet(comparison, summaries, [s.label for s in summary.standings])
    yield from _table(sheet.headers, sheet.rows)
    yield from ("", "![Average ranks; bars join what the Nemenyi test cannot tell apart](ranks.png)")


def _standing(s: Standing) -> tuple[str, ...]:
    test = s.versus_best
    against = ("–", "–") if test is None else (f"{test.wins} / {test.ties} / {test.losses}", f"{test.p_holm:.2g}")
    return s.label, figure_text(s.rank, 3), interval_text(s.median), *against


def _table(headers: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(headers) + " |"
    yield "|" + "---|" * len(headers)
    for row in body:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


if __name__ == "__main__":
    main()
