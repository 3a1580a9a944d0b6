"""The table of a comparison for the terminal, as wide as that allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from evo_hpo.report.results import Results
from evo_hpo.report.tables import Column, cache_note, columns, interval_note, rows
from evo_hpo.report.texts import text_columns

LAST = 7
"""The greatest priority of a column."""


def problem_table(
    results: Results, problem: str, *, compact: bool = False, moved: int = 0, second: bool = False
) -> Table:
    """The table of one problem for the terminal.

    ``compact`` breaks its cells into lines; columns of a priority up to ``moved`` are left to the ``second`` table,
    which has only them.
    """
    found = rows(results, problem)
    shown = [c for c in columns(results, problem, found) if (0 < c.priority <= moved) == second or c.key == "searcher"]
    title = None if second else results.name if len(results.problems) == 1 else f"{results.name}: {problem}"
    caption = None if second else interval_note(found) + cache_note(results, problem)
    return laid_out(results, problem, shown, title, caption, compact=compact, second=second)


def laid_out(
    results: Results,
    problem: str,
    shown: Sequence[Column],
    title: str | None,
    caption: str | None = None,
    *,
    compact: bool = False,
    second: bool = False,
) -> Table:
    """Columns as a table of the terminal, the best searcher in bold."""
    found = rows(results, problem)
    heading = None if title is None else Text(title, style="table.title")  # as Text, nothing in a name is markup
    note = None if caption is None else Text(caption, style="table.caption")
    table = Table(title=heading, caption=note, box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.caption_justify = "left"
    for column in shown:
        left = column.key == "searcher"
        header = Text(column.short if compact else column.title)
        table.add_column(header, justify="left" if left else "right", no_wrap=True)
    best = next((r.searcher for r in found if r.kind != "dense"), None)
    for i, r in enumerate(found):
        style = "bold" if r.searcher == best else {"dense": "dim", "uniform": "italic"}.get(r.kind, "")
        cells = [
            _broken(c.cells[i], second or j < 3 or c.key == "perplexity") if compact else c.cells[i]
            for j, c in enumerate(shown)
        ]
        table.add_row(*(Text(c, style=style) for c in cells))
    return table


def _broken(cell: str, interval: bool) -> str:
    """A cell on two lines; without its interval where there is no room for it."""
    return cell.replace(" [", "\n[").replace(":", ":\n") if interval else cell.split(" [")[0]


class FinalTable:
    """Tables of all problems, each as wide as the terminal allows."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        keys = [key for key in self.results.problems if self.results.of(key)]
        for key in keys:
            yield from self._fitting(key, console, options)
        if not keys:
            yield Text("no search has a result yet")

    def _fitting(self, key: str, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        table, moved = problem_table(self.results, key), 0
        for count in range(LAST + 1):
            if _width(table, console, options) <= options.max_width:
                break
            moved = count
            table = problem_table(self.results, key, compact=True, moved=moved)
        yield table
        if moved:
            yield problem_table(self.results, key, compact=True, moved=moved, second=True)
        yield from self._texts(key, console, options)

    def _texts(self, key: str, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """What there is on each held-out text: one table where that fits, else one for each text after the first."""
        shown = text_columns(self.results, key)
        if not shown:
            return
        for compact in (False, True):
            table = laid_out(self.results, key, shown, "on each held-out text", compact=compact)
            if _width(table, console, options) <= options.max_width:
                yield table
                return
        for text in self.results.problems[key].texts[1:]:
            own = [c for c in shown if c.key == "searcher" or c.key.startswith(f"{text}/")]
            yield laid_out(self.results, key, own, f"on {text}", compact=True)


def _width(table: Table, console: Console, options: ConsoleOptions) -> int:
    """Columns of the terminal that a table wants; its caption may be broken and does not count."""
    table.caption, caption = None, table.caption
    width = Measurement.get(console, options.update(max_width=10_000), table).maximum
    table.caption = caption
    return width


def final_table(results: Results) -> FinalTable:
    """The table to print when a comparison ends (or so far): one block a problem, best searcher first."""
    return FinalTable(results)
