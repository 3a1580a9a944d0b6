"""Progress of builds and comparisons: rich bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evo_hpo.run import events
from evo_hpo.run.plan import Plan
from evo_hpo.search.checkpoint import losses_by_text


def say(console: Console, line: str) -> None:
    """One line as it is: no markup, no colours, not broken; at once, also into a pipe."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _amount(value: float) -> str:
    """A count in at most five characters: 950, 12.3k, 4.5M."""
    for unit in ("", "k", "M", "G"):
        if float(f"{value:.3g}") < 1000:  # as it will be written
            break
        value, unit = value / 1000, "T"
    return f"{value:.3g}{unit}"


def _bars(console: Console, *texts: str) -> Progress:
    """Bars with these texts, the time that passed and the time that is left."""
    head = (TextColumn("{task.description}", style="bold", markup=False), BarColumn(bar_width=24))
    time_left = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*head, *(TextColumn(text, markup=False) for text in texts), *time_left, console=console)


@dataclass
class _Running:
    started: float
    bar: TaskID | None = None
    best: float | None = None
    held_out: Mapping[str, float] = field(default_factory=dict)
    failed: int = 0
    spent: float = 0.0
    trials: int = 0
    reported: float = 0.0
    replayed: float = 0.0  # of what is spent, before it started


class ComparisonProgress:
    """One bar for the whole comparison and one for each running search: budget used, best loss, time left."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.total = plan.budget.amount
        self.kind = plan.budget.kind
        self._problems = {planned.id: planned.problem for planned in plan.planned()}
        self.tasks = len(self._problems)
        self.console = console
        self.searches: dict[str, _Running] = {}
        self.done = 0
        self._ranged: set[str] = set()  # problems with a range of budgets
        self._bars: Progress | None = None
        self._all: TaskID | None = None
        if console.is_terminal:
            self._bars = _bars(console, "{task.fields[used]}", "{task.fields[loss]}")

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
            self._all = self._bars.add_task("comparison", total=self.tasks, used=f"0/{self.tasks} searches", loss="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, event: events.Event) -> None:
        """Hears an event of the comparison."""
        match event:
            case events.ProblemLoading(problem):
                say(self.console, f"{problem}: loading")
            case events.ProblemMade(made):
                if made.space.ranged:
                    self._ranged.add(made.key)
                for note in made.notes:
                    say(self.console, f"{made.key}: {note}")
            case events.ScorersUp(count):
                say(self.console, f"{count} scorers on the cluster")
            case events.SearchStarted(search):
                self._start(search)
            case events.BatchScored():
                self._batch(event)
            case events.CheckpointTaken(search, held_out):
                self.searches[search].held_out = held_out
            case events.SearchEnded(search, reason):
                self._end(search, reason)
            case events.SearchFailed(search, message):
                say(self.console, f"{search}: failed: {message}")

    def _start(self, key: str) -> None:
        running = self.searches[key] = _Running(time.monotonic())
        if self._bars:
            running.bar = self._bars.add_task(key, total=self.total, used="", loss="")
        else:
            say(self.console, f"{key}: started")

    def _batch(self, event: events.BatchScored) -> None:
        running = self.searches[event.search]
        running.spent, running.trials = event.spent, event.trials
        running.failed += event.failed
        if event.loss is not None:
            running.best = event.loss if running.best is None else min(running.best, event.loss)
        if event.replayed:
            running.started, running.replayed = time.monotonic(), running.spent
        if self._bars and running.bar is not None:
            used = f"{_amount(running.spent)}/{_amount(self.total)} {self.kind}"
            self._bars.update(running.bar, completed=running.spent, used=used, loss=self._loss(event.search))
        elif running.spent / self.total >= running.reported + 0.25:
            running.reported = running.spent / self.total // 0.25 * 0.25
            used = f"{_amount(running.spent)} of {_amount(self.total)} {self.kind}, {running.trials} trials"
            left = "from its journal" if event.replayed else f"{self._left(running):.0f} s left"
            say(self.console, f"{event.search}: {used}, {self._loss(event.search)}, {left}")

    def _left(self, running: _Running) -> float:
        """Seconds, at the speed of what was scored since the search started or went on."""
        scored = running.spent - running.replayed
        return (time.monotonic() - running.started) * (self.total - running.spent) / scored if scored else 0.0

    def _end(self, key: str, reason: str) -> None:
        running = self.searches[key]
        self.done += 1
        if self._bars and running.bar is not None and self._all is not None:
            self._bars.update(running.bar, completed=self.total, loss=self._loss(key), visible=False)
            self._bars.update(self._all, completed=self.done, used=f"{self.done}/{self.tasks} searches")
        failed = f", {running.failed} failed" if running.failed else ""
        used = f"{_amount(running.spent)} {self.kind}, {running.trials} trials{failed}"
        say(self.console, f"{key}: finished, {used}, {self._loss(key)} ({reason})")

    def _loss(self, search: str) -> str:
        running = self.searches[search]
        best = "nothing scored yet" if running.best is None else f"best {running.best:.4g}"
        if running.best is not None and self._problems[search] in self._ranged:
            best = f"of any budget: {best}"  # a search goes on improving at smaller ones
        losses = losses_by_text(running.held_out)
        return " ".join([best, *(f"{text or 'held-out'} {loss:.4g}" for text, loss in losses.items())])


class BuildProgress:
    """A bar (or a line every tenth) for each thing that counts up, such as the layers of a level store."""

    def __init__(self, title: str, console: Console) -> None:
        self.title = title
        self.console = console
        self._shown: dict[str, TaskID] = {}
        self._said: dict[str, int] = {}
        self._first, self._started = time.monotonic(), dict[str, float]()
        self._bars: Progress | None = None
        self._lock = threading.Lock()

    def __call__(self, done: int, total: int, what: str = "", title: str | None = None) -> None:
        """``done`` of ``total`` are finished; ``what`` is being worked on; ``title`` of another bar than its own."""
        title = self.title if title is None else title
        with self._lock:
            if self.console.is_terminal:
                if self._bars is None:
                    self._bars = _bars(self.console, "{task.completed:g}/{task.total:g} {task.fields[what]}")
                    self._bars.start()
                if title not in self._shown:
                    self._shown[title] = self._bars.add_task(title, total=total, what="")
                self._bars.update(self._shown[title], completed=done, total=total, what=what)
                return
            tenth, said = 10 * done // max(total, 1), self._said.get(title, -1)
            if tenth < 10 == said:  # the next thing of this title, such as the second of two stores
                said, self._started[title] = -1, time.monotonic()
            if total and tenth > said:
                self._said[title] = tenth
                elapsed = time.monotonic() - self._started.get(title, self._first)
                say(self.console, f"{title}: {done} of {total} {what} ({elapsed:.0f} s)")

    def close(self) -> None:
        """Removes the bars."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
